"""Timelines over HTTP."""

import json

import pytest

from flowkv.messages import Lost, Rejected
from flowkv.types import ATTEMPT_MARK, Output, Request
from tests.server.conftest import Served
from tests.server.fake_cluster import outputs

BODY = {"prompt": "hi", "max_tokens": 5, "temperature": 0}


def last(served: Served) -> dict[str, object]:
    record: dict[str, object] = served.client.get("/requests").json()["recent"][0]
    return record


def test_a_request_that_ended_is_in_the_list(served: Served) -> None:
    answer = served.client.post("/v1/completions", json=BODY, headers={"x-request-id": "find-me"})
    assert answer.status_code == 200
    record = last(served)
    assert str(record["request_id"]).startswith("cmpl-find-me")
    assert (record["state"], record["output_tokens"], record["status"]) == ("finished", 5, 200)
    assert record["phases"][0]["name"] == "tokenize"  # type: ignore[index]


def test_a_prompt_is_nowhere_in_it(served: Served) -> None:
    served.client.post("/v1/completions", json=BODY | {"prompt": "a secret of mine"})
    assert "secret" not in served.client.get("/requests").text + served.client.get("/debug/trace").text


def test_one_that_runs_is_live(served: Served) -> None:
    served.cluster.answer = lambda request: outputs(request, [104, 105, 106])[:2]  # and no end
    with served.client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        lines = answer.iter_lines()  # kept, or the connection is closed
        next(lines)
        [live] = served.client.get("/requests").json()["live"]
        assert (live["state"], live["e2el_s"]) == ("decoding", None)
    served.cluster.wait_for(lambda: bool(served.cluster.aborts))
    assert last(served)["state"] == "aborted"


def test_a_request_that_went_on_elsewhere_shows_its_attempts(served: Served) -> None:
    def answer(request: Request) -> list[Output | Rejected | Lost]:
        whole: list[Output | Rejected | Lost] = [*outputs(request, list(b"hello"))]
        return whole[2:] if ATTEMPT_MARK in request.request_id else [*whole[:2], Lost(request.request_id)]

    served.cluster.answer = answer
    assert served.client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "hello"
    record = last(served)
    assert record["num_attempts"] == 2
    phases: list[dict[str, object]] = record["phases"]  # type: ignore[assignment]
    assert [phase["attempt"] for phase in phases if phase["name"] == "place"] == [0, 1]


def test_the_length_of_the_lists_is_bounded(served: Served) -> None:
    for _ in range(3):
        served.client.post("/v1/completions", json=BODY)
    view = served.client.get("/requests?limit=2").json()
    assert [len(view[name]) for name in ("recent", "slowest")] == [2, 2]
    assert served.client.get("/requests?limit=-1").status_code == 400


def test_a_whole_answer_has_a_header_where_it_is_asked_for(served: Served) -> None:
    asked = served.client.post("/v1/completions", json=BODY, headers={"X-FlowKV-Timeline": "1"})
    assert asked.headers["server-timing"].startswith("tokenize;dur=")
    assert "total;dur=" in asked.headers["server-timing"]
    assert "server-timing" not in served.client.post("/v1/completions", json=BODY).headers


@pytest.mark.parametrize("wanted", [False, True])
def test_a_stream_ends_with_a_comment_where_it_is_asked_for(served: Served, wanted: bool) -> None:
    headers = {"X-FlowKV-Timeline": "1"} if wanted else {}
    text = served.client.post("/v1/completions", json=BODY | {"stream": True}, headers=headers).text
    assert (": server-timing tokenize;dur=" in text) == wanted
    assert text.endswith("data: [DONE]\n\n")


def test_the_trace_is_of_the_last_requests(served: Served) -> None:
    for name in ("one", "two"):
        served.client.post("/v1/completions", json=BODY, headers={"x-request-id": name})
    events = json.loads(served.client.get("/debug/trace?limit=1").text)["traceEvents"]
    found = {event["name"] for event in events}
    assert any(name.startswith("cmpl-two") for name in found) and not any("one" in name for name in found)
