"""Far more requests than can be served: each is served or told when to come back. Times are `benchmarks.overload`'s."""

import shlex

import pytest

from benchmarks.client import Client
from benchmarks.overload import SERVE, overloaded
from tests.heavy.leftovers import leaving_nothing

SUSTAINABLE = 20.0  # a second, about: what SERVE can do is bounded by the places and the length of its steps


@pytest.mark.parametrize("seconds", [4.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_every_request_is_answered_or_told_when_to_come_back(seconds: float) -> None:
    with leaving_nothing(*shlex.split(SERVE)) as server:
        result = overloaded(Client(server.url, timeout_s=60.0), SUSTAINABLE, 10.0, seconds, 0.5, 2.0, seed=1)
    for part in (result["during"], result["after"]):
        assert set(part["statuses"]) <= {"200", "429", "503"} and part["errors"] == []
        assert part["num_without_retry_after"] == 0
    assert {"200", "429"} <= set(result["during"]["statuses"])
