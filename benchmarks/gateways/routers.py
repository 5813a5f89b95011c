"""Routers of the field, each in an environment of its own, before engines that answer at once.

As P/D where they know it (one P, one D), as FlowKV is; and before two plain engines, which is less work: one call each.
The policies are those that look at no text, and retries, circuit breakers and logs are off where they can be.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import BenchmarkError
from benchmarks.peers import environments
from benchmarks.peers.process import PeerProcess
from benchmarks.report import ROOT
from benchmarks.spawn import free_port

PACKAGES = {"sglang": "sglang-router==0.3.2", "vllm": "vllm-router==0.1.17"}
_QUIET = ("--disable-retries", "--disable-circuit-breaker", "--log-level", "error", "--policy", "round_robin")


@dataclass(frozen=True, slots=True)
class Router:
    """`arguments(first, second)`: of the package's launcher, for engines at two URLs."""

    name: str
    package: str
    arguments: Callable[[str, str], Sequence[str]]

    def command(self, python: Path, port: int, engines: Sequence[str]) -> list[str]:
        module = f"{self.package}_router.launch_router"
        first, second = engines
        extra = self.arguments(first, second)
        return [str(python), "-m", module, "--host", "127.0.0.1", "--port", str(port), *extra]


def _sglang_pd(first: str, second: str) -> Sequence[str]:
    return ("--pd-disaggregation", "--prefill", first, "none", "--decode", second, *_QUIET, *_metrics())


def _sglang_mini(first: str, second: str) -> Sequence[str]:
    return ("--mini-lb", "--pd-disaggregation", "--prefill", first, "none", "--decode", second, "--policy", "random")


def _plain(first: str, second: str) -> Sequence[str]:
    return ("--worker-urls", first, second, *_QUIET, *_metrics())


def _vllm_pd(first: str, second: str) -> Sequence[str]:
    return ("--vllm-pd-disaggregation", "--prefill", first, "--decode", second, *_QUIET, *_metrics())


def _metrics() -> Sequence[str]:
    return ("--prometheus-port", str(free_port()))


ROUTERS = (
    Router("sglang mini_lb, P/D", "sglang", _sglang_mini),
    Router("sglang-router, P/D", "sglang", _sglang_pd),
    Router("sglang-router", "sglang", _plain),
    Router("vllm-router, P/D", "vllm", _vllm_pd),
    Router("vllm-router", "vllm", _plain),
)


def install(package: str, say: environments.Say) -> Path:
    """Its interpreter, installed where it is not yet."""
    folder = ROOT / "results" / "peers" / f"{package}-router"
    return environments.install(folder, [("install", PACKAGES[package])], say)


@contextmanager
def engines(count: int, num_tokens: int, logs: Path) -> Iterator[list[PeerProcess]]:
    """Servers that answer at once."""
    with ExitStack() as stack:
        processes = []
        for number in range(count):
            process = PeerProcess(
                lambda port: [sys.executable, "-m", "benchmarks.gateways.upstream", str(port), str(num_tokens)],
                logs / f"engine-{number}.log",
            )
            stack.enter_context(process)
            processes.append(process)
        yield processes


@contextmanager
def routing(router: Router, python: Path, urls: Sequence[str], logs: Path) -> Iterator[PeerProcess]:
    if len(urls) != 2:
        raise BenchmarkError("a router is measured before two engines")
    log = logs / f"{router.name.replace(' ', '-').replace('/', '').replace(',', '')}.log"
    process = PeerProcess(lambda port: router.command(python, port, urls), log)
    with process:
        yield process
