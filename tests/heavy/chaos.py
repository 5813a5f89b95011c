"""Havoc on a test's server, told with its seed where pytest shows it."""

from collections.abc import Sequence

from benchmarks.chaos.bodies import toy_bodies
from benchmarks.chaos.havoc import Chaos, Havoc, under_load
from benchmarks.chaos.load import Ask, Load
from tests.e2e.server import Server
from tests.e2e.test_toy_cluster import toy_tokens


async def load_through(server: Server, asks: Sequence[Ask], seed: int, concurrency: int, havoc: Havoc) -> Load:
    """What became of a steady load of `asks`."""
    load, chaos = Load(server.url, asks, concurrency, seed), Chaos(server, seed)
    try:
        await under_load(load, chaos, havoc)
    finally:
        print(f"seed {seed}, {len(load.outcomes)} requests", *chaos.story(), sep="\n  ")
    return load


def toy_asks(count: int, seed: int) -> list[Ask]:
    """With what one large instance in this process answers."""
    bodies = {str(i): body for i, body in enumerate(toy_bodies(count, seed))}
    texts = toy_tokens({name: body for name, (_, body) in bodies.items()})
    return [Ask(path, body, texts[name]) for name, (path, body) in bodies.items()]
