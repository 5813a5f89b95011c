"""What a server must not have left: blocks in use, zombies, processes, shared memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.server import Server, eventually, serving

HELD = ("num_waiting", "num_prefilling", "num_decoding", "num_sending", "num_receiving", "used_blocks")
_SHARED = re.compile(r"(/dev/shm/\S+)$", re.M)


def check_at_rest(server: Server, num_instances: int) -> None:
    """Every seat is in service again, none holds a request or a block, and nobody is a zombie."""
    eventually(lambda: len(instances(server)) == num_instances and all(map(is_well, instances(server))), "all are back")
    eventually(lambda: held(server) == {}, f"nothing is held: {held(server)}")
    eventually(lambda: zombies(server) == [], f"no zombie: {zombies(server)}")


def instances(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.client.get("/cluster").json()["instances"]
    return found


def is_well(instance: dict[str, Any]) -> bool:
    return not instance["is_stalled"] and not instance["is_draining"]


def held(server: Server) -> dict[str, dict[str, int]]:
    """What each instance still has, by name; those that have nothing are left out."""
    loads = {instance["name"]: instance["load"] for instance in instances(server)}
    counts = {name: {key: load[key] for key in HELD if load[key]} for name, load in loads.items()}
    return {name: count for name, count in counts.items() if count}


def zombies(server: Server) -> list[str]:
    """Processes of the server's session that have ended and that nobody has waited for."""
    return [name for session, name, state in _processes() if session == server.process.pid and state == "Z"]


def _processes() -> Iterator[tuple[int, str, str]]:
    """(session, name, state) of all."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                head, _, tail = (entry / "stat").read_text().rpartition(")")
            except (FileNotFoundError, ProcessLookupError):
                continue
            fields = tail.split()
            yield int(fields[3]), head.partition("(")[2], fields[0]


def shared_memory(server: Server) -> set[str]:
    """Named shared memory that its processes have mapped now."""
    found: set[str] = set()
    for pid in server.processes():
        try:
            found.update(_SHARED.findall(Path(f"/proc/{pid}/maps").read_text()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@contextmanager
def leaving_nothing(*arguments: str) -> Iterator[Server]:
    """A server that is at rest in the end, and of which nothing is left afterwards (`serving` looks at the rest)."""
    with serving(*arguments) as server:
        num_instances = len(instances(server))
        yield server
        check_at_rest(server, num_instances)
        mapped = shared_memory(server)
    left = [path for path in mapped if Path(path).exists()]
    assert left == [], "it has left shared memory behind"
