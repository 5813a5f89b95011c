"""`/v1/responses` by the `openai` package, and without it."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from flowkv.types import FinishReason, Output
from tests.server.conftest import Served
from tests.server.fake_cluster import outputs, say

TOOL: Any = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
}
CALLS = 'Hm. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call> Done.'


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_whole_answer(served: Served, client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="toy", input="hi", instructions="be brief", temperature=0.5, metadata={"a": "b"}, user="me", store=True
    )
    assert answer.output_text == "hello"
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.input_tokens_details.cached_tokens) == (5, 0)
    assert (answer.temperature, answer.metadata, answer.instructions) == (0.5, {"a": "b"}, "be brief")
    assert answer.id.startswith("resp_")
    request = served.cluster.requests[0]
    assert bytes(request.prompt_ids) == b"system: be brief\nuser: hi\nassistant: "
    assert request.sampling.temperature == 0.5


def test_the_input_as_items(served: Served, client: openai.OpenAI) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": "2"},
    ]
    client.responses.create(model="toy", input=items)
    prompt = bytes(served.cluster.requests[0].prompt_ids).decode()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert prompt.splitlines() == ["user: a", "b", f"assistant: c {json.dumps([call])}", "tool: 2", "assistant: "]


EVENTS_OF_TEXT = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    *["response.output_text.delta"] * 5,
    "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
]  # fmt: skip


def test_the_events_of_text(served: Served, client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="toy", input="hi", stream=True))
    assert [event.type for event in events] == EVENTS_OF_TEXT
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.response.output_text == "hello"
    assert last.response.usage.total_tokens == last.response.usage.input_tokens + 5


def with_end(text: str) -> Any:
    return lambda request: say(text + "\0")(request)


@pytest.fixture
def ending(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Toy serving whose model has an end, the byte 0."""
    monkeypatch.setattr("flowkv.server.text.byte_tokenizer.ByteTokenizer.eos_token_ids", frozenset({0}))
    return served


def test_a_stream_of_calls(ending: Served, client: openai.OpenAI) -> None:
    ending.cluster.answer = with_end(CALLS)
    with client.responses.stream(model="toy", input="hi", tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.done") == 3
    first, call, last = answer.output
    assert (first.type, call.type, last.type) == ("message", "function_call", "message")
    assert (call.name, call.arguments, call.status) == ("f", '{"x": 1}', "completed")  # type: ignore[union-attr]
    assert answer.output_text == "Hm.Done."


def test_what_came_out_can_go_back_in(ending: Served, client: openai.OpenAI) -> None:
    ending.cluster.answer = with_end(CALLS)
    first = client.responses.create(model="toy", input="hi", tools=[TOOL])
    call: Any = first.output[1]
    items: Any = [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "42"}]
    client.responses.create(model="toy", input=items)
    lines = bytes(ending.cluster.requests[1].prompt_ids).decode().splitlines()
    assert lines[0].startswith("assistant: Hm. [{") and call.call_id in lines[0]
    assert lines[1:] == ["assistant: Done.", "tool: 42", "assistant: "]


def test_calls_of_a_whole_answer(ending: Served, client: openai.OpenAI) -> None:
    ending.cluster.answer = with_end('<tool_call>\n{"name": "f", "arguments": {"x": 5}}\n</tool_call>')
    answer = client.responses.create(
        model="toy", input="hi", tools=[TOOL], tool_choice={"type": "function", "name": "f"}
    )
    (call,) = answer.output
    assert (call.type, call.arguments, answer.status) == ("function_call", '{"x": 5}', "completed")  # type: ignore[union-attr]
    grammar = ending.cluster.requests[0].sampling.grammar
    assert grammar is not None and '"const": "f"' in grammar.text


def test_a_whole_answer_has_the_items_of_the_stream(ending: Served) -> None:
    ending.cluster.answer = with_end(CALLS)
    body = {"input": "hi", "tools": [TOOL]}
    whole = ending.client.post("/v1/responses", json=body).json()
    text = ending.client.post("/v1/responses", json={**body, "stream": True}).text
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["response"]

    def contents(response: dict[str, Any]) -> list[Any]:
        return [item.get("arguments", item.get("content")) for item in response["output"]]

    assert contents(whole) == contents(last)
    assert set(whole) == set(last)


def test_the_format_of_text(ending: Served, client: openai.OpenAI) -> None:
    ending.cluster.answer = with_end("{}")
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    client.responses.create(
        model="toy", input="hi", text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    )
    grammar = ending.cluster.requests[0].sampling.grammar
    assert grammar is not None and json.loads(grammar.text) == schema


def test_log_probabilities(served: Served, client: openai.OpenAI) -> None:
    answer = client.responses.create(model="toy", input="hi", include=["message.output_text.logprobs"], top_logprobs=1)
    item: Any = answer.output[0]
    part = item.content[0]
    assert [entry.token for entry in part.logprobs] == list("hello")
    assert part.logprobs[0].top_logprobs[0].logprob == -0.5


def test_a_stream_that_fails_says_so(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = lambda request: [
        *outputs(request, [65, 66])[:1],
        Output(request.request_id, 0, 0, [], FinishReason.ERROR, error="d0.1 died"),
    ]
    *_, last = client.responses.create(model="toy", input="hi", stream=True)
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.message == "d0.1 died"
    item: Any = last.response.output[0]
    assert (item.content[0].text, item.status) == ("A", "incomplete")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [{"content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wrong"}}}}, "text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_refused(served: Served, fields: dict[str, Any], param: str) -> None:
    response = served.client.post("/v1/responses", json={"input": "hi", **fields})
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param
    assert not served.cluster.requests
    assert served.client.get("/v1/responses/resp_1").json()["error"]["code"] == "unsupported"
