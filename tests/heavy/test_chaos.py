"""Instances and the controller killed, stopped and woken under steady load: every request gets its whole answer.

The short forms run with everything else; the full ones (`slow`) are what `make test-all` adds. What a kill costs is
measured by `benchmarks.chaos`.
"""

import asyncio

import pytest

from benchmarks.chaos.bodies import bundled_bodies
from benchmarks.chaos.havoc import killing, killing_in_turn, pausing
from benchmarks.chaos.load import undisturbed
from tests.heavy.chaos import load_through, toy_asks
from tests.heavy.leftovers import leaving_nothing

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
    with leaving_nothing(*TOY, *BUSY, *TWO_AND_TWO, "--roles", roles) as server:
        load = asyncio.run(load_through(server, toy_asks(48, seed), seed, CONCURRENCY, killing(seconds, 2.0)))
        assert load.problems == []


@pytest.mark.parametrize(
    ("num_pauses", "lengths_s", "seed"),
    [(3, (0.1, 0.5, 2.0), 3), pytest.param(20, (0.1, 0.5, 2.0, 4.0, 12.0), 4, marks=FULL)],
)
def test_toys_are_stopped_and_woken(num_pauses: int, lengths_s: tuple[float, ...], seed: int) -> None:
    """For longer than a stall too, and so long that they are taken to hang and are killed."""
    lease = ("--set", "transfer.lease_s=0.5")
    with leaving_nothing(*TOY, *BUSY, *TWO_AND_TWO, *lease, "--roles", "fixed") as server:
        havoc = pausing(num_pauses, lengths_s)
        load = asyncio.run(load_through(server, toy_asks(48, seed), seed, CONCURRENCY, havoc))
        assert load.problems == []


@pytest.mark.parametrize(("num_kills", "seed"), [(2, 5), pytest.param(6, 6, marks=FULL)])
def test_the_bundled_model_is_killed_whenever_the_last_victim_is_back(num_kills: int, seed: int) -> None:
    with leaving_nothing(*BUNDLED, *TWO_AND_TWO) as server:
        asks = asyncio.run(undisturbed(server.url, bundled_bodies(24, seed)))
        havoc = killing_in_turn(num_kills, rest_s=10.0 if num_kills > 2 else 1.0)
        load = asyncio.run(load_through(server, asks, seed, 4, havoc))
        assert load.problems == []
