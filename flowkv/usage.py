"""What a process takes of its machine, as it says itself."""

import resource
from pathlib import Path

from flowkv.messages import Usage
from flowkv.types import ProcessUsage

INTERVAL_S = 1.0
_STATM = Path("/proc/self/statm")
_OPEN_FILES = Path("/proc/self/fd")
_RESIDENT = 1  # its place in statm, in pages


class UsageMeter:
    """Of this process, whose name it is; `take` has something to tell once a second."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._due_s = 0.0

    def take(self, now_s: float) -> Usage | None:
        if now_s < self._due_s:
            return None
        self._due_s = now_s + INTERVAL_S
        return Usage(self._process, measure())


def measure() -> ProcessUsage:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return ProcessUsage(
        resident_bytes=int(_STATM.read_text().split()[_RESIDENT]) * resource.getpagesize(),
        open_files=sum(1 for _ in _OPEN_FILES.iterdir()),
        cpu_seconds=spent.ru_utime + spent.ru_stime,
    )
