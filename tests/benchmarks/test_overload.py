import random

import pytest

from benchmarks.client import Answer
from benchmarks.open_loop import Shape, poisson_s
from benchmarks.overload import at_rate, recovery_s


def answered(sent_s: float, ttft_s: float = 0.1) -> Answer:
    event_s = [sent_s + ttft_s, sent_s + ttft_s + 0.02]
    return Answer(sent_s=sent_s, event_s=event_s, finished_s=event_s[-1], num_output_tokens=2, status=200)


def refused(sent_s: float, after_s: float, retry_after: str | None = "1") -> Answer:
    return Answer(
        sent_s=sent_s, finished_s=sent_s + after_s, status=429, error="HTTP 429: overloaded", retry_after=retry_after
    )  # fmt: skip


def test_goodput_is_of_the_time_in_which_requests_came() -> None:
    found = at_rate([answered(0.0), answered(1.0), answered(2.0, ttft_s=3.0), refused(3.0, 0.01)], 1.0, 4.0)
    assert found["goodput_per_s"] == 2 / 4.0
    assert found["good_fraction"] == 0.5
    assert found["statuses"] == {"200": 3, "429": 1}
    assert found["refusal_s"]["max"] == pytest.approx(0.01)
    assert (found["num_without_retry_after"], found["errors"]) == (0, [])


def test_what_is_no_answer_is_told() -> None:
    broken = Answer(sent_s=0.0, finished_s=1.0, error="connection failed")
    found = at_rate([answered(0.0), broken, refused(1.0, 0.1, retry_after=None)], 1.0, 2.0)
    assert found["errors"] == [("connection failed", 1)]
    assert found["num_without_retry_after"] == 1


def test_recovery_ends_with_the_last_that_was_late_or_refused() -> None:
    answers = [refused(10.0, 0.1), answered(11.0), answered(12.0, ttft_s=2.0), answered(13.0)]
    assert recovery_s(answers, end_s=9.5) == 2.5
    assert recovery_s(answers[3:], end_s=9.5) == 0.0


def test_arrivals_are_as_many_as_the_rate_says() -> None:
    arrivals_s = poisson_s(100.0, 50.0, seed=1)
    assert arrivals_s == sorted(arrivals_s) and arrivals_s[0] > 0 and arrivals_s[-1] < 50.0
    assert 4600 < len(arrivals_s) < 5400


def test_a_request_has_the_size_that_was_asked_for() -> None:
    body = Shape(7, 3).body(random.Random(0))
    assert len(body["prompt"]) == 7 and body["max_tokens"] == 3  # type: ignore[arg-type]
