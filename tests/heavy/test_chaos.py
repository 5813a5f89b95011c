"""Instances and the controller killed, stopped and woken under steady load: every request gets its whole answer.

The short forms run with everything else; the full ones (`slow`) are what `make test-all` adds.
"""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from flowkv.bundled.recall import recall_task
from tests.e2e.server import Server
from tests.heavy.chaos import Chaos, under_load, until
from tests.heavy.leftovers import instances, leaving_nothing
from tests.heavy.load import toy_asks, undisturbed

TWO_AND_TWO = ("--prefill", "2", "--decode", "2")
TOY = ("--toy", "--set", "engine.check_integrity=true", "--set", "toy_step_s=0.01")
# Prompts take several steps, and pools (2,048 tokens) are small enough that blocks are in use again soon.
BUSY = ("--set", "engine.max_batch_tokens=64", "--kv-memory", "96KiB")
BUNDLED = ("--threads", "1", "--dtype", "float32", "--set", "engine.max_batch_tokens=128")
CONCURRENCY = 16
FULL = pytest.mark.slow


@pytest.mark.parametrize(
    ("roles", "seconds", "seed"),
    [
        ("fixed", 8, 1),
        pytest.param("fixed", 60, 2, marks=FULL),
        pytest.param("flexible", 60, 3, marks=FULL),
    ],
)
def test_toys_are_killed_every_two_seconds_and_the_controller_once(roles: str, seconds: int, seed: int) -> None:
    async def havoc(chaos: Chaos) -> None:
        num_kills = seconds // 2
        for number in range(num_kills):
            await asyncio.sleep(2.0)
            chaos.kill_one()
            if number == num_kills // 2:
                await asyncio.sleep(1.0)  # some of the time alone, some of it with an instance that is down
                await chaos.kill_controller()

    with leaving_nothing(*TOY, *BUSY, *TWO_AND_TWO, "--roles", roles) as server:
        load = asyncio.run(under_load(server, toy_asks(48, seed), seed, CONCURRENCY, havoc))
        assert load.problems == []


@pytest.mark.parametrize(
    ("num_pauses", "lengths_s", "seed"),
    [(3, (0.1, 0.5, 2.0), 3), pytest.param(20, (0.1, 0.5, 2.0, 4.0, 12.0), 4, marks=FULL)],
)
def test_toys_are_stopped_and_woken(num_pauses: int, lengths_s: tuple[float, ...], seed: int) -> None:
    """For longer than a stall too, and so long that they are taken to hang and are killed."""

    async def havoc(chaos: Chaos) -> None:
        for _ in range(num_pauses):
            await chaos.pause_one(chaos.random.choice(lengths_s))
            await asyncio.sleep(chaos.random.uniform(0.0, 1.0))

    lease = ("--set", "transfer.lease_s=0.5")
    with leaving_nothing(*TOY, *BUSY, *TWO_AND_TWO, *lease, "--roles", "fixed") as server:
        load = asyncio.run(under_load(server, toy_asks(48, seed), seed, CONCURRENCY, havoc))
        assert load.problems == []


@pytest.mark.parametrize(("num_kills", "seed"), [(2, 5), pytest.param(6, 6, marks=FULL)])
def test_the_bundled_model_is_killed_whenever_the_last_victim_is_back(num_kills: int, seed: int) -> None:
    async def havoc(chaos: Chaos) -> None:
        for number in range(num_kills):
            await kill_and_wait(chaos)
            if number == num_kills // 2:
                await chaos.kill_controller()
            await asyncio.sleep(10.0 if num_kills > 2 else 1.0)

    with leaving_nothing(*BUNDLED, *TWO_AND_TWO) as server:
        asks = undisturbed(server, bundled_bodies(24, seed))
        load = asyncio.run(under_load(server, asks, seed, 4, havoc))
        assert load.problems == []


async def kill_and_wait(chaos: Chaos) -> None:
    """For the cluster to know a successor of the victim."""
    victim = chaos.kill_one()
    seat = victim.partition("~")[0]
    await until(lambda: has_successor(chaos.server, seat, victim), f"{victim} is replaced", timeout_s=120.0)


def has_successor(server: Server, seat: str, victim: str) -> bool:
    names = {instance["name"] for instance in instances(server)}
    return victim not in names and any(name.partition("~")[0] == seat for name in names)


def bundled_bodies(count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions whose answers stand only in the KV cache, and verses that a seed makes."""
    rng = random.Random(seed)
    for number in range(count):
        if number % 2:
            task = recall_task(rng, "The evil that men do lives after them;\n" * rng.randrange(20))
            yield "/v1/chat/completions", {"messages": list(task.messages), "max_tokens": 16, "temperature": 0}
        else:
            body = {"prompt": "ROMEO:\n" * rng.randrange(1, 20), "max_tokens": 60, "temperature": 0.8, "seed": number}
            yield "/v1/completions", body
