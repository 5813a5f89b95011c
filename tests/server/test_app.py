import json
import socket
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowkv.messages import Abort, Rejected
from flowkv.server.records.cluster_view import ClusterView
from flowkv.types import GRAMMAR_ENDED, FinishReason, Output, Regime, Request
from tests.server.conftest import MAX_BODY_BYTES, Served
from tests.server.fake_cluster import CONTEXT_TOKENS, VOCAB_SIZE, outputs, say, status

USER = [{"role": "user", "content": "hi"}]
ROUTES: dict[str, dict[str, Any]] = {"/v1/completions": {"prompt": "hi"}, "/v1/chat/completions": {"messages": USER}}
both_routes = pytest.mark.parametrize("route", ROUTES)


def post(served: Served, route: str, **fields: Any) -> httpx.Response:
    return served.client.post(route, json={**ROUTES[route], **fields})


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response: httpx.Response, code: int) -> dict[str, Any]:
    assert response.status_code == code
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


# --- answers -------------------------------------------------------------------------------------------------------


def test_whole_completion(served: Served) -> None:
    body = post(served, "/v1/completions", prompt="abc").json()
    assert body["object"] == "text_completion"
    assert body["model"] == "toy"
    assert body["choices"] == [
        {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == usage(3, 5)
    assert served.cluster.requests[0].prompt_ids == list(b"abc")


def test_whole_chat(served: Served) -> None:
    body = post(served, "/v1/chat/completions", stop_token_ids=[ord("o")]).json()
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hell", "refusal": None}
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord("o"))
    assert bytes(served.cluster.requests[0].prompt_ids) == b"user: hi\nassistant: "


def test_streamed_completion(served: Served) -> None:
    chunks = events(post(served, "/v1/completions", stream=True, n=2))
    for number in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == number]
        assert "".join(choice["text"] for choice in mine) == f"hello{number}"
        assert [choice["finish_reason"] for choice in mine] == [None] * 5 + ["length"]
    assert not any("usage" in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_streamed_chat_with_usage(served: Served) -> None:
    chunks = events(post(served, "/v1/chat/completions", stream=True, stream_options={"include_usage": True}))
    *others, last = chunks
    assert last["choices"] == []
    assert last["usage"] == usage(20, 5)
    assert all(chunk["usage"] is None for chunk in others)
    assert others[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in others) == "hello"
    assert others[-1]["choices"][0]["finish_reason"] == "length"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@both_routes
def test_usage_so_far_in_every_chunk(served: Served, route: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(post(served, route, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"]]
    assert counts == sorted(counts)
    assert set(counts) >= {1, 2, 3, 4, 5}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5


def test_token_ids_of_a_completion(served: Served) -> None:
    fields = {"prompt": ["ab", "c"], "return_token_ids": True, "max_tokens": 2}
    choices = post(served, "/v1/completions", **fields).json()["choices"]
    assert [(choice["prompt_token_ids"], choice["token_ids"]) for choice in choices] == [
        (list(b"ab"), list(b"he")),
        (list(b"c"), list(b"he")),
    ]
    chunks = events(post(served, "/v1/completions", stream=True, **fields))
    second = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 1]
    assert [choice.get("prompt_token_ids") for choice in second] == [list(b"c"), None]
    assert [choice["token_ids"] for choice in second] == [[ord("h")], [ord("e")]]


def test_token_ids_of_a_chat(served: Served) -> None:
    prompt_ids = list(b"user: hi\nassistant: ")
    body = post(served, "/v1/chat/completions", return_token_ids=True).json()
    assert body["prompt_token_ids"] == prompt_ids
    assert body["choices"][0]["token_ids"] == list(b"hello")
    first, *others = events(post(served, "/v1/chat/completions", return_token_ids=True, stream=True))
    assert first["prompt_token_ids"] == prompt_ids
    assert not any("prompt_token_ids" in chunk for chunk in others)
    assert [token_id for chunk in others for token_id in chunk["choices"][0]["token_ids"]] == list(b"hello")


def test_several_prompts_are_numbered_across(served: Served) -> None:
    served.cluster.answer = lambda request: say(bytes(request.prompt_ids).decode())(request)
    body = post(served, "/v1/completions", prompt=["ab", [99, 100]], n=2).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "ab0"),
        (1, "ab1"),
        (2, "cd0"),
        (3, "cd1"),
    ]
    assert body["usage"] == usage(4, 12)


@both_routes
def test_stop_strings_across_tokens(served: Served, route: str) -> None:
    served.cluster.answer = say("one STOP two")
    choice = post(served, route, stop="STOP").json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == "one "
    chunks = events(post(served, route, stop=["x", "TOP"], include_stop_str_in_output=True, stream=True))
    shown = "".join(
        chunk["choices"][0].get("text") or chunk["choices"][0].get("delta", {}).get("content", "") for chunk in chunks
    )
    assert shown == "one STOP"


def test_completion_logprobs(served: Served) -> None:
    served.cluster.answer = say("ok")
    logprobs = post(served, "/v1/completions", logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["o", "k"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"o": -0.5, "B": -9999.0}, {"k": -0.5, "B": -9999.0}],
        "text_offset": [0, 1],
    }


def test_echo_with_logprobs_of_the_prompt_alone(served: Served) -> None:
    body = post(served, "/v1/completions", prompt="abc", echo=True, logprobs=1, max_tokens=0).json()
    (choice,) = body["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_echo_comes_before_the_text(served: Served, stream: bool) -> None:
    served.cluster.answer = say("ok")
    response = post(served, "/v1/completions", prompt=[97, 98], echo=True, logprobs=0, stream=stream)
    choices = [chunk["choices"][0] for chunk in events(response)] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "abok"
    assert [token for choice in choices for token in choice["logprobs"]["tokens"]] == ["a", "b", "o", "k"]
    assert [offset for choice in choices for offset in choice["logprobs"]["text_offset"]] == [0, 1, 2, 3]


def test_echo_with_logprobs_of_every_choice(served: Served) -> None:
    body = post(served, "/v1/completions", prompt="ab", echo=True, logprobs=0, n=2, max_tokens=1).json()
    assert [choice["text"] for choice in body["choices"]] == ["abh", "abh"]
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [[None, -0.5, -0.5]] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(served: Served, stream: bool) -> None:
    served.cluster.answer = say("ok")
    response = post(served, "/v1/chat/completions", logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk["choices"][0] for chunk in events(response)] if stream else response.json()["choices"]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in entries] == ["o", "k"]
    assert entries[0] == {
        "token": "o",
        "logprob": -0.5,
        "bytes": [111],
        "top_logprobs": [
            {"token": "o", "logprob": -0.5, "bytes": [111]},
            {"token": "B", "logprob": -9999.0, "bytes": [66]},
        ],
    }


# --- errors --------------------------------------------------------------------------------------------------------


@both_routes
@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'{"x": ' + b"[" * 40_000, b"\xff"])
def test_malformed_bodies(served: Served, route: str, data: bytes) -> None:
    error = error_of(served.client.post(route, content=data), 400)
    assert error["type"] == "invalid_request_error"


@both_routes
@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('"temperature": NaN', "temperature"),
        ('"temperature": -1', "temperature"),
        ('"max_tokens": "many"', "max_tokens"),
        ('"n": 0', "n"),
        ('"stop_token_ids": [100000]', "stop_token_ids"),
    ],
)
def test_bad_fields(served: Served, route: str, text: str, param: str) -> None:
    data = json.dumps(ROUTES[route])[:-1] + ", " + text + "}"
    error = error_of(served.client.post(route, content=data), 400)
    assert error["param"] == param
    assert not served.cluster.requests


@both_routes
def test_unknown_model(served: Served, route: str) -> None:
    error = error_of(post(served, route, model="gpt-9"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@both_routes
@pytest.mark.parametrize("model", ["", None, "toy"])
def test_model_left_out_is_the_one_served(served: Served, route: str, model: str | None) -> None:
    assert post(served, route, model=model).json()["model"] == "toy"


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""]])
def test_empty_prompt(served: Served, prompt: Any) -> None:
    error = error_of(post(served, "/v1/completions", prompt=prompt), 400)
    assert (error["code"], error["param"]) == ("empty_prompt", "prompt")


@pytest.mark.parametrize("prompt", [[VOCAB_SIZE], [-1], [10**30]])
def test_token_ids_outside_the_vocabulary(served: Served, prompt: list[int]) -> None:
    error = error_of(post(served, "/v1/completions", prompt=prompt), 400)
    assert str(VOCAB_SIZE) in error["message"]


def test_too_long_for_the_context_or_the_pool(served: Served) -> None:
    error = error_of(post(served, "/v1/completions", prompt="x" * 100, max_tokens=CONTEXT_TOKENS - 99), 400)
    assert error["code"] == "context_length_exceeded"
    assert f"context length is {CONTEXT_TOKENS}" in error["message"]
    error = error_of(post(served, "/v1/chat/completions", messages=[{"role": "user", "content": "x" * 50_000}]), 400)
    assert error["param"] == "messages"
    served.cluster.status = status(max_request_tokens=32)
    while served.client.get("/v1/models/toy").json()["max_model_len"] != 32:
        pass
    error = error_of(post(served, "/v1/completions", prompt="x" * 30, max_tokens=3), 400)
    assert "KV pool holds at most 32" in error["message"]


def test_max_tokens_left_out_is_the_room_that_is_left(served: Served) -> None:
    post(served, "/v1/completions", prompt="x" * 20)
    assert served.cluster.requests[0].sampling.max_tokens == CONTEXT_TOKENS - 20


def test_too_many_choices(served: Served) -> None:
    error_of(post(served, "/v1/completions", prompt=["a"] * 100, n=100), 400)


@both_routes
@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 10 * 2**20])
def test_body_over_the_limit(served: Served, route: str, size: int) -> None:
    error = error_of(served.client.post(route, content=b"x" * size), 413)
    assert str(MAX_BODY_BYTES) in error["message"]
    chunked = served.client.post(route, content=(b"x" * 10_000 for _ in range(20)))
    error_of(chunked, 413)
    assert served.client.get("/health").status_code == 200


@both_routes
@pytest.mark.parametrize("stream", [False, True])
def test_rejected_by_the_controller(served: Served, route: str, stream: bool) -> None:
    served.cluster.answer = lambda request: [Rejected(request.request_id, 429, "too many requests", "overloaded")]
    response = post(served, route, stream=stream)
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    assert response.headers["retry-after"] == "1"


def broken(request: Request) -> list[Output | Rejected]:
    lost = Output(request.request_id, 0, 0, [], FinishReason.ERROR, error="d0.1 died")
    return [*outputs(request, [65, 66])[:1], lost]


@both_routes
def test_an_instance_fails(served: Served, route: str) -> None:
    served.cluster.answer = broken
    error = error_of(post(served, route), 500)
    assert (error["type"], error["message"]) == ("server_error", "d0.1 died")
    chunks = events(post(served, route, stream=True))
    assert chunks[-1]["error"]["message"] == "d0.1 died"


@both_routes
def test_a_grammar_that_gets_too_much_is_not_the_servers_fault(served: Served, route: str) -> None:
    def ended(request: Request) -> list[Output | Rejected]:
        return [
            *outputs(request, [65, 66])[:1],
            Output(request.request_id, 0, 0, [], FinishReason.ERROR, error=GRAMMAR_ENDED),
        ]

    served.cluster.answer = ended
    assert error_of(post(served, route), 400)["code"] == "grammar_too_complex"
    assert events(post(served, route, stream=True))[-1]["error"]["code"] == "grammar_too_complex"


@both_routes
def test_a_cluster_that_is_not_ready(served: Served, route: str) -> None:
    served.cluster.status = status(ready=False)
    while served.client.get("/ready").status_code == 200:
        pass
    response = post(served, route)
    assert error_of(response, 503)["code"] == "not_ready"
    assert response.headers["retry-after"] == "1"
    assert served.client.get("/health").status_code == 200


def test_unknown_routes_and_methods(served: Served) -> None:
    error_of(served.client.get("/v1/nothing"), 404)
    error_of(served.client.get("/v1/completions"), 405)


def test_a_bug_is_an_answer_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowkv.server.api.text_service.build_request", lambda *_: 1 / 0)
    # A connection of its own: the server closes it after the traceback.
    response = httpx.post(f"{served.url}/v1/completions", json={"prompt": "hi"})
    assert error_of(response, 500)["code"] == "internal_error"


# --- clients that go away --------------------------------------------------------------------------------------------


@both_routes
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_outputs", [0, 1])
def test_a_client_that_goes_away_aborts(served: Served, route: str, stream: bool, num_outputs: int) -> None:
    served.cluster.answer = lambda request: outputs(request, [65, 66])[:num_outputs]
    data = json.dumps({**ROUTES[route], "stream": stream}).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        served.cluster.wait_for(lambda: bool(served.cluster.requests))
        if stream and num_outputs:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
    request_id = served.cluster.requests[0].request_id
    served.cluster.wait_for(lambda: Abort(request_id) in served.cluster.aborts)


def test_a_client_that_goes_away_within_its_body(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert post(served, "/v1/completions").status_code == 200


@pytest.mark.parametrize(("retry_after_s", "header"), [(2.1, "3"), (0.01, "1"), (None, "1")])
def test_what_admission_refuses_says_when_to_try_again(
    served: Served, retry_after_s: float | None, header: str
) -> None:
    priorities: set[int] = set()  # of what was submitted, once or more often

    def refuse(request: Request) -> list[Output | Rejected]:
        priorities.add(request.priority)
        return [Rejected(request.request_id, 429, "too late by then", retry_after_s=retry_after_s)]

    served.cluster.answer = refuse
    response = post(served, "/v1/chat/completions", stream=True, priority=5)
    error = error_of(response, 429)
    assert (error["type"], error["message"]) == ("rate_limit_error", "too late by then")
    assert response.headers["retry-after"] == header
    assert priorities == {5}


# --- the rest --------------------------------------------------------------------------------------------------------


def test_models(served: Served) -> None:
    (card,) = served.client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("toy", "model", CONTEXT_TOKENS)
    assert served.client.get("/v1/models/toy").json() == card
    error_of(served.client.get("/v1/models/other/one"), 404)


def test_load(served: Served) -> None:
    load = served.client.get("/load").json()
    assert (load["num_running"], load["num_waiting"], load["num_blocks"]) == (0, 0, 64)
    assert (load["used_blocks"], load["kv_used_fraction"]) == (0, 0.0)
    served.cluster.answer = lambda request: outputs(request, [65, 66])[:1]
    with served.client.stream("POST", "/v1/completions", json={"prompt": "hi", "stream": True}):
        assert served.client.get("/load").json()["server_load"] == load["server_load"] + 1


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/images/generations", "/v1/audio/speech", "/rerank"])
def test_what_this_server_does_not_have(served: Served, path: str) -> None:
    error = error_of(served.client.post(path, json={"model": "toy", "input": "hi"}), 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsupported")


def test_version(served: Served) -> None:
    assert served.client.get("/version").json()["version"]


def test_the_cluster_in_json(served: Served) -> None:
    view = msgspec.json.decode(served.client.get("/cluster").content, type=ClusterView)
    assert (view.model_name, view.is_ready, view.regime) == ("toy", True, Regime.NORMAL)
    assert view.instances == status().instances
    served.cluster.status = msgspec.structs.replace(status(), regime=Regime.OVERLOADED, num_flips=2, num_refused=3)
    while (later := msgspec.json.decode(served.client.get("/cluster").content, type=ClusterView)).num_flips != 2:
        pass
    assert (later.regime, later.num_refused) == (Regime.OVERLOADED, 3)
    assert later.time_s > view.time_s


def test_metrics(served: Served) -> None:
    post(served, "/v1/completions")
    response = served.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert {"flowkv_ttft_seconds", "flowkv_itl_seconds", "flowkv_instance_blocks_used"} <= names


def test_paths_and_methods_that_are_not_there_are_counted(served: Served) -> None:
    assert served.client.get("/nothing").status_code == 404
    assert served.client.put("/v1/completions").status_code == 405
    shown = served.client.get("/metrics").text
    assert 'reason="not_found"' in shown and 'reason="method_not_allowed"' in shown
