import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.server.records.history import RECENT_S, WINDOW_S, Held, History, Sketch

DURATIONS = st.floats(1e-5, 1e3)


def test_each_second_has_what_happened_in_it() -> None:
    history = History(10.2)
    history.submitted(10.3, 7)
    history.submitted(10.9, 5)
    history.first_token(11.0, 0.5)
    history.tokens(11.1, 1, None)
    history.tokens(11.2, 3, 0.01)
    history.ended(11.3, failed=False)
    history.ended(11.4, failed=True)
    history.refused(11.5)
    first, second = history.since(12.0, 0)
    assert (first.tick, first.requests, first.prompt_tokens, first.output_tokens) == (10, 2, 12, 0)
    assert (second.tick, second.requests, second.output_tokens) == (11, 0, 4)
    assert (second.finished, second.failed, second.refused) == (1, 1, 1)
    assert second.ttft_s is not None and second.ttft_s.p50 == pytest.approx(0.5, rel=0.03)
    assert second.itl_s is not None and second.itl_s.p99 == pytest.approx(0.01, rel=0.03)
    assert first.ttft_s is None


def test_a_second_is_told_when_it_is_over_and_once() -> None:
    history = History(10.0)
    assert history.since(10.99, 0) == []
    assert [second.tick for second in history.since(13.0, 0)] == [10, 11, 12]
    assert [second.tick for second in history.since(14.0, 13)] == [13]


def test_a_call_with_an_earlier_time_counts_now() -> None:
    """A request is counted when it is submitted, with the time when it came."""
    history = History(10.0)
    history.refused(12.0)
    history.submitted(11.0, 1)
    assert [second.requests for second in history.since(13.0, 0)] == [0, 0, 1]


def test_what_is_held_stays_until_something_else_is_heard() -> None:
    history = History(0.0)
    history.holds(1.5, Held(waiting=3, running=2, used_fraction=0.5))
    assert [(second.waiting, second.running) for second in history.since(4.0, 0)] == [(0, 0), (3, 2), (3, 2), (3, 2)]


def test_memory_is_bounded_whatever_the_pause() -> None:
    history = History(0.0)
    history.submitted(0.5, 1)
    seconds = history.since(1e6, 0)
    assert [second.tick for second in seconds] == list(range(10**6 - WINDOW_S, 10**6))


def test_recent_latencies_are_of_the_last_minute() -> None:
    history = History(0.0)
    history.first_token(0.5, 9.0)
    history.first_token(1.5, 0.1)
    history.first_token(2.5, 0.1)
    recent = history.recent(3.0)
    assert recent.ttft_s is not None and recent.ttft_s.p50 == pytest.approx(0.1, rel=0.03)
    assert recent.ttft_s.p99 == pytest.approx(9.0, rel=0.03)
    later = history.recent(RECENT_S + 1.0)
    assert later.ttft_s is not None and later.ttft_s.p99 == pytest.approx(0.1, rel=0.03)
    assert history.recent(RECENT_S + 3.0).ttft_s is None


@given(st.lists(DURATIONS, min_size=1, max_size=200))
def test_quantiles_are_within_their_bucket(durations: list[float]) -> None:
    sketch = Sketch()
    for seconds in durations:
        sketch.add(seconds)
    quantiles = sketch.quantiles()
    assert quantiles is not None
    ordered = sorted(durations)
    for fraction, found in zip((0.5, 0.95, 0.99), quantiles, strict=True):
        exact = ordered[math.ceil(fraction * len(ordered)) - 1]
        assert found == pytest.approx(exact, rel=0.025)


@given(st.lists(DURATIONS), st.lists(DURATIONS))
def test_merged_sketches_are_one_of_all(one: list[float], other: list[float]) -> None:
    apart, together = (Sketch(), Sketch()), Sketch()
    for sketch, durations in zip(apart, (one, other), strict=True):
        for seconds in durations:
            sketch.add(seconds)
            together.add(seconds)
    apart[0].merge(apart[1])
    assert apart[0].quantiles() == together.quantiles()


def test_durations_that_cannot_be_are_bounded() -> None:
    sketch = Sketch()
    for seconds in (0.0, -1.0, 1e30):
        sketch.add(seconds)
    quantiles = sketch.quantiles()
    assert quantiles is not None and statistics.mean(quantiles) < 1e7
