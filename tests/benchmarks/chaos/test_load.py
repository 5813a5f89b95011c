"""The judge itself: whatever a disturbance may do to a stream is seen."""

from typing import Any

import pytest

from benchmarks.chaos.load import Ask, Outcome

ASK = Ask("/v1/completions", {}, ["abcd", "xy"])


def event(number: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": number, "text": text, "finish_reason": finish_reason}]}


WHOLE = [event(0, "ab"), event(1, "x"), event(0, "cd", "length"), event(1, "y", "stop")]


def problem(events: list[dict[str, Any]], is_done: bool = True) -> str | None:
    outcome = Outcome.of(ASK)
    for one in events:
        outcome.take(one)
    outcome.end(is_done)
    return outcome.problem


def test_a_whole_answer_is_fine() -> None:
    assert problem(WHOLE) is None


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (WHOLE[:3], "choice 1 ended with None"),
        ([WHOLE[0], *WHOLE], "choice 0 says 'ab' at 2"),  # a token twice
        (WHOLE[1:], "choice 0 says 'cd' at 0"),  # a token lost
        ([*WHOLE, event(0, "")], "goes on after its end"),
        ([*WHOLE[:3], event(1, "z", "stop")], "choice 1 says 'z' at 1"),
        ([*WHOLE[:3], event(1, "", "stop")], "choice 1 has 1 of 2"),
        ([*WHOLE[:3], event(1, "y", "abort")], "choice 1 ended with abort"),
        ([WHOLE[0], {"error": {"code": "instance_died"}}], "instance_died"),
    ],
)
def test_whatever_is_wrong_is_seen(events: list[dict[str, Any]], expected: str) -> None:
    found = problem(events)
    assert found is not None and expected in found


def test_a_stream_that_just_stops_is_seen() -> None:
    assert problem(WHOLE, is_done=False) == "the stream ended without [DONE]"


def test_a_chat_is_read_like_a_completion() -> None:
    outcome = Outcome.of(Ask("/v1/chat/completions", {}, ["ab"]))
    outcome.take({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    outcome.take({"choices": [{"index": 0, "delta": {"content": "ab"}, "finish_reason": "stop"}]})
    outcome.end(True)
    assert outcome.problem is None
