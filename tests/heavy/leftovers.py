"""What a server must not have left: blocks in use, zombies, processes, shared memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos.running import held, instances, is_well, shared_memory, zombies
from tests.e2e.server import Server, eventually, serving


def check_at_rest(server: Server, num_instances: int) -> None:
    """Every seat is in service again, none holds a request or a block, and nobody is a zombie."""
    eventually(lambda: len(instances(server)) == num_instances and all(map(is_well, instances(server))), "all are back")
    eventually(lambda: held(server) == {}, f"nothing is held: {held(server)}")
    eventually(lambda: zombies(server) == [], f"no zombie: {zombies(server)}")


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
