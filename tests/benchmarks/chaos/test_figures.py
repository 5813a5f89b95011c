from typing import Any

import pytest

from benchmarks.chaos.figures import Seen, phase_figures, seen
from benchmarks.chaos.havoc import Deed
from benchmarks.chaos.load import Ask, Outcome

ASK = Ask("/v1/completions", {}, ["abc"])


def outcome(*text_s: float, began_s: float = 0.0, request_id: str = "cmpl-1") -> Outcome:
    """A whole one, with text at these times."""
    return Outcome(
        ASK, began_s, ["abc"], ["length"], text_s=list(text_s), is_whole=True, request_id=request_id,
        ended_s=max(text_s, default=began_s),
    )  # fmt: skip


def record(num_attempts: int = 1, request_id: str = "cmpl-1-0") -> dict[str, Any]:
    return {"request_id": request_id, "num_attempts": num_attempts, "output_tokens": 3, "phases": []}


def test_requests_that_were_hit_are_told_from_others() -> None:
    requests = [
        Seen(outcome(1.0, 1.5, 4.0), record(num_attempts=3)),
        Seen(outcome(2.0, 2.25, began_s=1.5), record()),
        Seen(outcome(5.0), record(num_attempts=2)),  # before its first token, which is its only one
    ]
    found = phase_figures(requests, [])
    assert (found["num_hit"], found["hits"]) == (2, {"1": 1, "2": 1})
    assert found["longest_gap_s"]["hit"]["max"] == 2.5
    assert found["longest_gap_s"]["others"]["max"] == 0.25
    assert (found["ttft_s"]["hit"]["max"], found["ttft_s"]["others"]["max"]) == (5.0, 0.5)
    assert found["output_tokens_per_s"] == 9 / 5.0


def test_what_differs_and_what_is_broken_is_counted_and_told() -> None:
    differs, broken = outcome(1.0), outcome(1.0)
    differs.problem, broken.problem, broken.is_whole = "says b, not a", "status 500", False
    found = phase_figures([Seen(one, record()) for one in (outcome(1.0), differs, broken)], [])
    assert (found["num_requests"], found["num_equal"], found["num_differing"], found["num_broken"]) == (3, 1, 1, 1)
    assert found["problems"] == ["says b, not a", "status 500"]


def test_deeds_are_counted_by_what_they_were_and_to_whom() -> None:
    deeds = [
        Deed(1.0, "SIGKILL", "decode-0", over_s=1.5),
        Deed(2.0, "SIGKILL", "controller", over_s=2.25),
        Deed(3.0, "SIGSTOP", "prefill-0", over_s=4.0),
        Deed(4.0, "SIGCONT", "prefill-0"),
    ]
    found = phase_figures([Seen(outcome(0.5, 1.75), record(num_attempts=2))], deeds)
    assert (found["num_kills"], found["num_controller_kills"], found["num_pauses"]) == (1, 1, 1)
    assert (found["replaced_s"]["max"], found["controller_replaced_s"]["max"]) == (0.5, 0.25)
    [longest] = found["longest_gaps"]
    assert (longest["seconds"], longest["deeds_before_it_s"]) == (1.25, {"SIGKILL decode-0": -0.5})


def test_a_request_is_found_in_what_the_server_says() -> None:
    known, unknown = outcome(1.0), outcome(request_id="")
    found = seen([known, unknown], [record(num_attempts=2), record(num_attempts=5, request_id="cmpl-2-0")])
    assert [one.num_hits for one in found] == [1, 0]


@pytest.mark.parametrize("text_s", [(), (1.0,)])
def test_no_gap_where_there_are_no_two_events(text_s: tuple[float, ...]) -> None:
    assert phase_figures([Seen(outcome(*text_s), record()), Seen(outcome(9.0), record())], [])["longest_gaps"] == []
