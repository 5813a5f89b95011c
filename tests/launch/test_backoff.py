import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.launch.backoff import PROGRESS_S, Backoff


def delays(backoff: Backoff, count: int) -> list[float | None]:
    return [backoff.ended(0.0) for _ in range(count)]


def test_failures_in_a_row_are_followed_later_and_later_and_the_last_of_them_by_nobody() -> None:
    assert delays(Backoff(8, 30.0), 8) == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, None]


def test_none_is_started_again_where_no_failure_is_allowed() -> None:
    backoff = Backoff(0, 30.0)
    backoff.worked()
    assert backoff.ended(0.0) is None
    assert backoff.describe_end() == "restart.max_failures is 0"


def test_work_and_time_in_service_are_progress_and_being_ready_alone_is_not() -> None:
    backoff = Backoff(8, 30.0)
    assert delays(backoff, 3) == [0.0, 1.0, 2.0]
    backoff.ready(100.0)
    assert backoff.ended(100.0 + PROGRESS_S - 0.1) == 4.0
    backoff.ready(200.0)
    assert backoff.ended(200.0 + PROGRESS_S) == 0.0
    assert backoff.num_failures == 0
    assert delays(backoff, 2) == [0.0, 1.0]
    backoff.ready(300.0)
    backoff.worked()
    assert backoff.ended(300.0) == 0.0
    assert delays(backoff, 2) == [0.0, 1.0], "what one has done does not count for the next"


def test_the_user_hears_when_and_how_often() -> None:
    backoff = Backoff(4, 30.0)
    backoff.ended(0.0)
    assert backoff.describe() == "starting it again"
    backoff.ended(0.0)
    assert backoff.describe() == "starting it again in 1 s (failure 2 of at most 4 without progress)"
    assert delays(backoff, 2) == [2.0, None]
    assert backoff.describe_end() == "4 times in a row without progress"


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0.0, 2 * PROGRESS_S)), max_size=60),
    st.integers(0, 40),
    st.floats(0.0, 100.0),
)
def test_no_row_of_failures_is_longer_than_allowed_and_no_delay_too_long(
    lives: list[tuple[bool, float]], max_failures: int, max_delay_s: float
) -> None:
    backoff, now_s, row = Backoff(max_failures, max_delay_s), 0.0, 0
    for has_worked, served_s in lives:
        backoff.ready(now_s)
        if has_worked:
            backoff.worked()
        since_s, now_s = now_s, now_s + served_s
        row = 0 if has_worked or now_s - since_s >= PROGRESS_S else row + 1
        delay_s = backoff.ended(now_s)
        assert (delay_s is None) == (row >= max_failures)
        if delay_s is None:
            return
        assert 0.0 <= delay_s <= max_delay_s
        assert delay_s == pytest.approx(0.0 if row < 2 else min(max_delay_s, 2.0 ** (row - 2)))
