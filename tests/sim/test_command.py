"""`flowkv simulate` as a user types it; what it runs is made up where the run itself does not matter."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from flowkv import cli
from flowkv.config import ClusterConfig
from flowkv.sim import run
from flowkv.sim.chrome import Recorder
from flowkv.sim.costs import list_cost_models
from flowkv.sim.figures import SimResult
from flowkv.sim.workload import LogNormal, TraceRequest, bursts, shift_test
from tests.sim.results import result

MOONCAKE = '{"timestamp": %d, "input_length": 600, "output_length": 7, "hash_ids": [3, 4]}\n'


class Simulated:
    """Stands for `simulate`: remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        config: ClusterConfig,
        requests: Iterable[TraceRequest],
        *,
        seed: int = 0,
        coalesce: bool = True,
        on_progress: Callable[[float, int], None] | None = None,
        recorder: Recorder | None = None,
    ) -> SimResult:
        self.calls.append({
            "config": config, "requests": list(requests), "seed": seed, "coalesce": coalesce, "recorder": recorder,
        })  # fmt: skip
        if on_progress is not None:
            on_progress(1.0, 1)
        return result()

    @property
    def requests(self) -> list[TraceRequest]:
        return self.calls[-1]["requests"]  # type: ignore[no-any-return]

    @property
    def config(self) -> ClusterConfig:
        return self.calls[-1]["config"]  # type: ignore[no-any-return]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    simulated = Simulated()
    monkeypatch.setattr(run, "simulate", simulated)
    return simulated


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace"
    path.write_text("".join(MOONCAKE % (1000 * second) for second in range(10)))
    return path


def flowkv(*options: object) -> int:
    return cli.main(["simulate", *map(str, options)])


# --- workloads -----------------------------------------------------------------------------------------------------


def test_a_trace_is_cut_and_scaled(simulated: Simulated, trace: Path) -> None:
    assert flowkv("--trace", trace, "--speedup", 2, "--scale-length", 0.5, "--num-requests", 3) == 0
    assert [request.arrival_s for request in simulated.requests] == [0.0, 0.5, 1.0]
    assert {request.num_prompt_tokens for request in simulated.requests} == {300}
    assert flowkv("--trace", trace, "--speedup", 2, "--duration", 2) == 0
    assert len(simulated.requests) == 4  # the first 2 s once it is sped up


def test_a_trace_over_and_over(simulated: Simulated, trace: Path) -> None:
    assert flowkv("--trace", trace, "--repeat", "--num-requests", 25, "--speedup", 10) == 0
    assert [request.arrival_s for request in simulated.requests[9:12]] == [0.9, 1.0, 1.1]
    assert len(simulated.requests) == 25


def test_drawn_workloads(simulated: Simulated) -> None:
    lengths = (LogNormal(80.0, 0.4), LogNormal(9.0, 0.4))
    drawn = ("--prompt-tokens", 80, "--output-tokens", 9, "--spread", 0.4, "--burstiness", 0.5, "--seed", 3)
    assert flowkv("--poisson", 5, "--duration", 60, *drawn) == 0
    assert simulated.requests == bursts(5.0, 0.5, 60.0, *lengths, seed=3)
    assert flowkv("--shift", "--duration", 30) == 0
    assert simulated.requests == shift_test(1.0, 0, duration_s=30.0)
    assert flowkv("--shift", 0.1) == 0
    assert simulated.requests == shift_test(0.1, 0)


# --- the cluster ---------------------------------------------------------------------------------------------------


def test_options_win_over_the_file(simulated: Simulated, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        'prefill = 3\ndecode = 5\n[slo]\nttft_s = 9.0\ntpot_s = 1.0\n[simulate]\ncost = "llama-3.1-8b/a100"\n'
    )
    options = ["--prefill", 1, "--decode", 2, "--mixed", 0, "--roles", "fixed", "--slo-ttft", 2, "--admission"]
    assert flowkv("--poisson", 5, "--config", file, *options, "--set", "simulate.noise_fraction=0", "--seed", 7) == 0
    config = simulated.config
    assert [role.value for role in config.roles] == ["prefill", "decode", "decode"]
    assert (config.scheduling.roles, config.slo.ttft_s, config.slo.tpot_s) == ("fixed", 2.0, 1.0)
    assert (config.slo.admission, config.simulate.noise_fraction) == (True, 0.0)
    assert config.simulate.cost == "llama-3.1-8b/a100"
    assert (simulated.calls[-1]["seed"], simulated.calls[-1]["coalesce"]) == (7, True)


def test_one_cost_model_for_all_or_one_for_each(simulated: Simulated) -> None:
    assert flowkv("--poisson", 5, "--cost", "llama-3.1-8b/l20") == 0
    shared = simulated.config.simulate.cost
    assert flowkv("--poisson", 5, "--cost", "llama-3.1-8b/l20", "--cost", "llama-3.1-8b/h20", "--single-steps") == 0
    assert shared == "llama-3.1-8b/l20"
    assert simulated.config.simulate.cost == ["llama-3.1-8b/l20", "llama-3.1-8b/h20"]
    assert simulated.calls[-1]["coalesce"] is False


def test_the_list_names_every_cost_model_and_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert flowkv("--list") == 0
    out = capsys.readouterr().out
    assert all(f"{model.name}\n    {model.source}\n" in out for model in list_cost_models())


# --- what comes out ------------------------------------------------------------------------------------------------


def test_table_report_plots_and_trace(simulated: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, chrome = tmp_path / "out", tmp_path / "life" / "trace.json"
    assert flowkv("--poisson", 5, "--slo-ttft", 0.75, "--out", out, "--plots", "--chrome-trace", chrome) == 0
    text = capsys.readouterr().out
    assert "1 prefill, 1 decode, roles flexible, on llama-3.1-8b/h100, seed 0" in text
    assert "TTFT" in text and "25.0% within the SLO" in text and "role flips: 1" in text
    report = json.loads((out / "report.json").read_text())
    assert report["figures"]["good_fraction"] == 0.25
    assert report["config"]["slo"]["ttft_s"] == 0.75
    assert report["options"]["poisson"] == 5.0
    assert len(report["samples"]) == 5 and len(report["requests"]["e2el_s"]) == 4
    assert {path.name for path in out.iterdir()} == {"report.json", "load.png", "latency.png"}
    assert json.loads(chrome.read_text())["traceEvents"]


def test_nothing_is_written_or_recorded_unasked(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert flowkv("--poisson", 5) == 0
    assert not list(tmp_path.iterdir())
    assert simulated.calls[-1]["recorder"] is None


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--trace {tmp}/none", "none: cannot be read: No such file"),
        ("--trace {tmp}/broken", "broken:2: not a Mooncake request"),
        ("--trace {tmp}/unsorted", "unsorted:2: arrives 1 s before the one above it"),
        ("--trace {tmp}/trace --num-requests 11", "has 10 requests, fewer than 11"),
        ("--trace {tmp}/trace --repeat", "--repeat takes"),
        ("--poisson 5 --repeat --num-requests 9", "--repeat takes"),
        ("--poisson 0.001 --duration 1", "no request arrives"),
        ("--poisson 5 --slo-ttft -1", "slo.ttft_s is a positive number"),
        ("--poisson 5 --slo-ttft 0.001", "slo.ttft_s of 0.001 s cannot be kept: the shortest step"),
        ("--poisson 5 --slo-tpot 0.001", "slo.tpot_s of 0.001 s cannot be kept: the shortest step"),
        ("--poisson 5 --cost llama-3.1-8b/h1000", "there is no cost model llama-3.1-8b/h1000"),
        ("--poisson 5 --cost {tmp}/trace", "trace: not a profile"),
        ("--poisson 5 --cost llama-3.1-8b/l20 --cost llama-3.1-70b/h100x4", "a cluster serves one"),
        ("--poisson 5 --prefill 0 --decode 0", "at least one instance"),
        ("--poisson 5 --config {tmp}/none.toml", "there is no configuration file"),
        ("--poisson 5 --set slo.ttft=1", "ttft"),
        ("--poisson 5 --plots", "--plots needs --out"),
        ("--poisson 5 --out {tmp}/trace", "trace: cannot be written"),
        ("--poisson 5 --chrome-trace {tmp}/trace/life.json", "trace: cannot be written"),
        ("--poisson 5 --chrome-trace {tmp}", "cannot be written: it is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_runs(
    simulated: Simulated, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    (tmp_path / "broken").write_text(MOONCAKE % 0 + "{\n")
    (tmp_path / "unsorted").write_text(MOONCAKE % 1000 + MOONCAKE % 0)
    before = sorted(tmp_path.iterdir())
    options = options.format(tmp=tmp_path)
    assert (
        flowkv(*options.split(), *([] if "--out" in options or "--plots" in options else ["--out", tmp_path / "out"]))
        == 1
    )
    error = capsys.readouterr().err
    assert error.startswith("flowkv: error: ") and error.count("\n") == 1
    assert words in error
    assert not simulated.calls
    assert sorted(tmp_path.iterdir()) == before


def test_plots_without_matplotlib_fail_before_the_run(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert flowkv("--poisson", 5, "--plots", "--out", tmp_path / "out") == 1
    assert "flowkv[plots]" in capsys.readouterr().err
    assert not simulated.calls


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--poisson 0",
        "--poisson inf",
        "--poisson 1 --shift",
        "--poisson 1 --spread -1",
        "--shift 1 --num-requests 0",
    ],
)
def test_options_that_cannot_be(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        flowkv(*options.split())
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_loads_neither_numpy_nor_matplotlib() -> None:
    code = (
        "import sys\nfrom flowkv import cli\n"
        "try:\n    cli.main(['simulate', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(', '.join({'numpy', 'matplotlib', 'rich', 'torch'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--chrome-trace" in done.stdout
