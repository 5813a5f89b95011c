from collections.abc import Callable
from pathlib import Path

import pytest

from flowkv.config import load_config
from flowkv.doctor import network, resources
from flowkv.doctor.finding import Finding, Level
from flowkv.doctor.machine import chosen, look_at_machine, parse_cpu_max
from tests.doctor.machines import machine

ALONE = load_config(None, {"toy": True}, [])
NETWORKED = load_config(None, {"toy": True, "network.listen": "127.0.0.1"}, [])


def sized(memory: str, instances: int = 2) -> Finding:
    config = load_config(None, {"toy": True, "prefill": 1, "decode": instances - 1, "engine.kv_memory": memory}, [])
    return resources.memory(config, machine(available_bytes=2**30), weights_bytes=2**26)


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        (resources.cores(ALONE, machine()), Level.OK, "2 x 3 computing threads on 8 cores"),
        (resources.cores(ALONE, machine(num_cores=1)), Level.WARN, "more cores"),
        (resources.cores(ALONE, machine(cpu_quota=3.0)), Level.WARN, "--threads 1"),
        (sized("300MiB"), Level.OK, "2 pools of 300 MiB"),
        (sized("auto"), Level.OK, "pools made to fit"),
        (sized("430MiB"), Level.WARN, "a smaller --kv-memory"),
        (sized("400MiB", 3), Level.FAIL, "3 pools of 400 MiB, 3 x 64 MiB of weights, 1.0 GiB free"),
        (resources.shared_memory(machine()), Level.OK, "work"),
        (resources.shared_memory(machine(pools_work=False)), Level.FAIL, "memfd_create"),
        (resources.locked_memory(NETWORKED, machine(memlock_bytes=65536)), Level.OK, "64 KiB"),
        (resources.locked_memory(ALONE, machine(memlock_bytes=65536, rdma_devices=("mlx5_0",))), Level.OK, "only RDMA"),
        (
            resources.locked_memory(NETWORKED, machine(memlock_bytes=65536, rdma_devices=("mlx5_0",))),
            Level.WARN, "ulimit -l unlimited",
        ),
        (resources.open_files(machine()), Level.OK, "65536"),
        (resources.open_files(machine(max_files=1024)), Level.WARN, "ulimit -n 65536"),
        (resources.open_files(machine(max_files=256, max_files_hard=4096)), Level.FAIL, "ulimit -n 4096"),
        (resources.processes(ALONE, machine()), Level.OK, "as many"),
        (resources.processes(ALONE, machine(max_processes=100)), Level.WARN, "pids.max"),
        (resources.run_folder(machine()), Level.OK, "/tmp/flowkv-*"),
        (resources.run_folder(machine(run_folder="/tmp/" + 90 * "x")), Level.FAIL, "TMPDIR=/tmp"),
        (resources.run_folder(machine(run_folder="/no/such")), Level.FAIL, "cannot be written to"),
        (resources.kernel(machine()), Level.OK, "6.1"),
        (resources.kernel(machine(pidfds_work=False)), Level.FAIL, "5.4 or newer"),
        (resources.huge_pages(machine()), Level.OK, "advise"),
        (resources.huge_pages(machine(huge_page_mode="never")), Level.OK, "4 KiB"),
        (resources.instructions(ALONE, machine()), Level.OK, "AVX512-BF16"),
        (resources.instructions(ALONE, machine(cpu_flags=frozenset({"avx2"}))), Level.OK, "oneDNN"),
        (resources.instructions(ALONE, machine(cpu_flags=frozenset())), Level.WARN, "no AVX2"),
        (resources.instructions(ALONE, machine(architecture="aarch64")), Level.OK, "aarch64"),
        (network.clock(True, True), Level.OK, "synchronised"),
        (network.clock(None, True), Level.OK, "cannot be told"),
        (network.clock(False, False), Level.OK, "does not need"),
        (network.clock(False, True), Level.WARN, "chrony"),
    ],
)  # fmt: skip
def test_red_and_green(found: Finding, level: Level, words: str) -> None:
    assert found.level is level, found
    assert words in f"{found.text} -> {found.advice}"
    assert bool(found.advice) is (level is not Level.OK)


def test_bfloat16_without_its_instructions_is_slow() -> None:
    config = load_config(None, {"toy": True, "dtype": "bfloat16"}, [])
    assert resources.instructions(config, machine(cpu_flags=frozenset({"avx2"}))).advice == "--dtype float32"


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_cpu_max, None, None),
        (parse_cpu_max, "max 100000", None),
        (parse_cpu_max, "150000 100000", 1.5),
        (chosen, "always within_size [never] deny", "never"),
        (chosen, None, None),
        (chosen, "", None),
    ],
)
def test_files_of_the_kernel(parse: Callable[[str | None], object], text: str | None, value: object) -> None:
    assert parse(text) == value


def test_this_machine_can_be_looked_at() -> None:
    found = look_at_machine()
    assert found.num_cores >= 1 and found.available_bytes > 0 and found.max_files > 0
    assert found.pools_work and found.pidfds_work and Path(found.run_folder).is_dir()
