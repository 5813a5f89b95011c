import select
import signal
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from flowkv.launch.signals import StopRequested, StopSignals
from flowkv.signals import STOP_SIGNALS


@pytest.fixture
def handlers_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signals(handlers_put_back: None) -> Iterator[StopSignals]:
    with closing(StopSignals()) as some:
        yield some


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_one_before_there_is_anything_to_drain_ends_it(signals: StopSignals, signum: signal.Signals) -> None:
    signals.heed()
    signal.raise_signal(signum)  # which interrupts nothing
    assert is_readable(signals.fd)
    with pytest.raises(StopRequested):
        signals.heed()


def test_the_same_telling_may_come_twice_and_a_second_one_ends_it(signals: StopSignals, clock: list[float]) -> None:
    signals.lets_drain = True
    signal.raise_signal(signal.SIGTERM)
    assert signals.is_drain_asked and is_readable(signals.fd)
    clock[0] += 0.2
    signal.raise_signal(signal.SIGTERM)
    signals.heed()
    assert not is_readable(signals.fd)
    clock[0] += 0.1
    signal.raise_signal(signal.SIGINT)
    assert is_readable(signals.fd)
    with pytest.raises(StopRequested):
        signals.heed()


def test_what_an_operator_drains_ends_at_the_first_signal(signals: StopSignals, clock: list[float]) -> None:
    signals.lets_drain = True
    signals.ask_drain()
    signals.heed()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopRequested):
        signals.heed()


@pytest.mark.usefixtures("handlers_put_back")
def test_who_is_started_by_nohup_outlives_its_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with closing(StopSignals()) as signals:
        signal.raise_signal(signal.SIGHUP)
        signals.heed()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopRequested):
            signals.heed()


def is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0.0)[0])
