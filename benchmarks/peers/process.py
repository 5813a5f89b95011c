"""A peer's server as a process, and what the processes of this run do with the cores."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from benchmarks.spawn import ServerProcess

IDLE_CORE_FRACTION = 0.05
_INTERVAL_S = 0.5


class PeerProcess(ServerProcess):
    """The server that `command(port)` starts, from `with` to the end of the block; the context's value is its URL.

    It is ready when `GET ready_path` gives 200. BenchmarkError, with the end of its log, where it does not become so.
    The code it ends with on SIGTERM is its own affair, and what it leaves behind is killed.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        log: Path,
        ready_path: str = "/health",
        start_timeout_s: float = 600.0,
    ) -> None:
        super().__init__([], log, start_timeout_s)
        self._command = list(command(int(self.url.rpartition(":")[2])))
        self._ready_path = ready_path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._terminate()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}{self._ready_path}", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False  # it does not listen yet


def with_environment(variables: Mapping[str, str], command: Sequence[str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *command]


def pin_children(pid: int, name: str, core: int) -> None:
    """Move every thread of the processes below `pid` whose names hold `name` to one core, as `taskset -a` does."""
    for process in psutil.Process(pid).children(recursive=True):
        for thread in process.threads() if name in process.name() else ():
            with suppress(ProcessLookupError):  # a thread that has ended needs no core
                os.sched_setaffinity(thread.id, {core})


def settled_core_fraction(timeout_s: float = 5.0) -> float:
    """Cores that all processes started by this one use together, once that is at most IDLE_CORE_FRACTION.

    After `timeout_s` of more it is what they used last. (vLLM's worker polls for a second after its last step.)
    """
    deadline_s = time.monotonic() + timeout_s
    while (fraction := _core_fraction(_INTERVAL_S)) > IDLE_CORE_FRACTION and time.monotonic() < deadline_s:
        pass
    return fraction


def _core_fraction(interval_s: float) -> float:
    before_s, start_s = _children_cpu_s(), time.perf_counter()
    time.sleep(interval_s)
    used_s = _children_cpu_s() - before_s
    return round(max(0.0, used_s) / (time.perf_counter() - start_s), 3)


def _children_cpu_s() -> float:
    total_s = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s
