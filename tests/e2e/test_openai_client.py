"""The `openai` package, unmodified, against real processes: a request is prefilled on one and decoded on another."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.e2e.server import Server, serving

USER: Any = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    is_sunny: bool


TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": Weather.model_json_schema(), "strict": True},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--toy", "--roles", "fixed", "--set", "engine.check_integrity=true") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60.0, max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: Any = {"model": "toy", "messages": USER, "max_tokens": 20, "seed": 7, "n": 2}
    whole = client.chat.completions.create(**fields)
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert {choice.index: choice.message.content for choice in whole.choices} == texts


def test_an_answer_that_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="toy", messages=USER, response_format=Weather, seed=1, max_tokens=400)
    assert answer.choices[0].message.parsed is not None
    assert answer.choices[0].message.parsed.city in ("Paris", "Rome")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_that_must_be_made(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.parse(
        model="toy", messages=USER, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, seed=2, max_tokens=600
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"
    Weather.model_validate_json(call.function.arguments)


def test_a_stream_of_calls_that_must_be_made(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="toy",
        messages=USER,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        seed=3,
        max_tokens=600,
    ) as stream:
        stream.until_done()
        answer = stream.get_final_completion()
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(json.loads(call.function.arguments)["is_sunny"], bool)


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.parse(model="toy", input="hi", text_format=Weather, max_output_tokens=400)
    assert whole.output_parsed is not None
    with client.responses.stream(model="toy", input="hi", text_format=Weather, max_output_tokens=400) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed is not None


def test_completions_with_everything(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="toy", prompt=["ab", "c"], n=2, echo=True, logprobs=2, max_tokens=3, logit_bias={"65": 100},
        extra_body={"return_token_ids": True, "temperature": 0},
    )  # fmt: skip
    assert [choice.text for choice in answer.choices] == ["abAAA"] * 2 + ["cAAA"] * 2
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == [65, 65, 65]
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 5


def test_ids_that_a_client_sends_are_found_again(server: Server, client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="toy", prompt="hi", max_tokens=2, extra_headers={"X-Request-Id": "job-1"}
    )
    assert raw.headers["x-request-id"] == "job-1"
    assert raw.parse().id.startswith("cmpl-job-1-")
    recent = server.client.get("/requests").json()["recent"]
    assert any(record["request_id"].startswith("cmpl-job-1-") for record in recent)


def test_text_to_ids_and_back(server: Server) -> None:
    found = server.client.post("/tokenize", json={"prompt": "héllo"}).json()
    assert server.client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "héllo"}
