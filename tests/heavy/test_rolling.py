"""Every instance restarted in turn, roles flipped by hand, under load. `tests/e2e` has the short forms."""

import asyncio

import httpx
import pytest

from benchmarks.chaos.bodies import bundled_bodies
from benchmarks.chaos.havoc import Chaos, until
from benchmarks.chaos.load import undisturbed
from benchmarks.chaos.running import instances
from flowkv.types import Role
from tests.heavy.chaos import load_through, toy_asks
from tests.heavy.leftovers import leaving_nothing
from tests.heavy.test_chaos import BUNDLED, BUSY, CONCURRENCY, TOY, TWO_AND_TWO

pytestmark = pytest.mark.slow


async def restart_all(chaos: Chaos) -> None:
    """Until every instance is another one."""
    before = {instance["name"] for instance in instances(chaos.server)}
    await post(chaos, "/admin/restart")
    await until(lambda: is_renewed(chaos, before), "all are restarted", timeout_s=180.0)


def is_renewed(chaos: Chaos, before: set[str]) -> bool:
    names = {instance["name"] for instance in instances(chaos.server)}
    return len(names) == len(before) and not names & before


async def post(chaos: Chaos, path: str, **params: str) -> None:
    chaos.note(path, " ".join(params.values()))
    async with httpx.AsyncClient(base_url=chaos.server.url, timeout=60.0) as client:
        answer = await client.post(path, params=params)
    assert answer.is_success, answer.text


@pytest.mark.parametrize("roles", ["fixed", "flexible"])
def test_toys_are_restarted_in_turn_three_times(roles: str) -> None:
    async def havoc(chaos: Chaos) -> None:
        for _ in range(3):
            await restart_all(chaos)

    with leaving_nothing(*TOY, *BUSY, *TWO_AND_TWO, "--roles", roles) as server:
        load = asyncio.run(load_through(server, toy_asks(48, seed=7), 7, CONCURRENCY, havoc))
        assert load.problems == []


def test_the_bundled_model_is_restarted_in_turn() -> None:
    with leaving_nothing(*BUNDLED, *TWO_AND_TWO) as server:
        asks = asyncio.run(undisturbed(server.url, bundled_bodies(24, seed=8)))
        load = asyncio.run(load_through(server, asks, 8, 4, restart_all))
        assert load.problems == []


def test_roles_are_flipped_every_third_of_a_second() -> None:
    async def havoc(chaos: Chaos) -> None:
        for _ in range(60):
            name = chaos.random.choice([instance["name"] for instance in instances(chaos.server)])
            await post(chaos, "/admin/flip", instance=name, role=chaos.random.choice(list(Role)))
            await asyncio.sleep(0.3)

    with leaving_nothing(*TOY, *BUSY, *TWO_AND_TWO, "--roles", "fixed") as server:
        load = asyncio.run(load_through(server, toy_asks(48, seed=9), 9, CONCURRENCY, havoc))
        assert load.problems == []
