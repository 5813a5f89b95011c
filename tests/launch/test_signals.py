import signal
import time
from collections.abc import Iterator

import pytest

from flowkv.launch.signals import StopRequested, StopSignals
from flowkv.signals import STOP_SIGNALS


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    some = StopSignals()
    yield some
    some.close()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_one_before_there_is_anything_to_drain_ends_it(signals: StopSignals, signum: signal.Signals) -> None:
    with pytest.raises(StopRequested):
        signal.raise_signal(signum)
    signal.raise_signal(signum)  # must not interrupt the clearing up


def test_the_same_telling_may_come_twice_and_a_second_one_ends_it(signals: StopSignals, clock: list[float]) -> None:
    signals.lets_drain = True
    signal.raise_signal(signal.SIGTERM)
    assert signals.is_drain_asked
    clock[0] += 0.2
    signal.raise_signal(signal.SIGTERM)
    clock[0] += 0.1
    with pytest.raises(StopRequested):
        signal.raise_signal(signal.SIGINT)


def test_what_an_operator_drains_ends_at_the_first_signal(signals: StopSignals, clock: list[float]) -> None:
    signals.lets_drain = True
    signals.ask_drain()
    with pytest.raises(StopRequested):
        signal.raise_signal(signal.SIGTERM)
