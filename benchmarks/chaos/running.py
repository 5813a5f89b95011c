"""A running server seen from outside: its processes, its instances, and what it must not have left."""

import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx

HELD = ("num_waiting", "num_prefilling", "num_decoding", "num_sending", "num_receiving", "used_blocks")
_SHARED = re.compile(r"(/dev/shm/\S+)$", re.M)


class Launched(Protocol):
    @property
    def pid(self) -> int:
        """Of the launcher, which leads a session of its own."""


class Running(Launched, Protocol):
    url: str


class Process(NamedTuple):
    pid: int
    name: str
    state: str  # a letter of proc(5)
    session: int


def processes(server: Launched) -> list[Process]:
    """All of its session: those too whose parent has died."""
    found = [read_stat(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [process for process in found if process is not None and process.session == server.pid]


def read_stat(entry: Path) -> Process | None:
    """Of `/proc/PID` or `/proc/PID/task/TID`; None if it has just ended."""
    try:
        head, _, tail = (entry / "stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = tail.split()
    return Process(int(entry.name), head.partition("(")[2], fields[0], int(fields[3]))


def living(server: Launched) -> list[Process]:
    return [process for process in processes(server) if process.state not in "ZX"]


def zombies(server: Launched) -> list[str]:
    """Those that have ended and that nobody has waited for."""
    return [process.name for process in processes(server) if process.state == "Z"]


def shared_memory(server: Launched) -> set[str]:
    """Named shared memory that its processes have mapped now."""
    found: set[str] = set()
    for process in living(server):
        try:
            found.update(_SHARED.findall(Path(f"/proc/{process.pid}/maps").read_text()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def instances(server: Running) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{server.url}/cluster", timeout=60.0).json()["instances"]
    return found


def is_well(instance: dict[str, Any]) -> bool:
    return not instance["is_stalled"] and not instance["is_draining"]


def held(server: Running) -> dict[str, dict[str, int]]:
    """What each instance still has, by name; those that have nothing are left out."""
    loads = {instance["name"]: instance["load"] for instance in instances(server)}
    counts = {name: {key: load[key] for key in HELD if load[key]} for name, load in loads.items()}
    return {name: count for name, count in counts.items() if count}
