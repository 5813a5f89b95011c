"""Thoughts told apart from answers over HTTP, by the `openai` package and without it."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from flowkv.config import ServerConfig
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.server.text.chat_template import Conversation
from flowkv.types import GrammarKind
from tests.server.conftest import Served
from tests.server.fake_cluster import say

USER: Any = [{"role": "user", "content": "hi"}]
INSIDE: Any = {
    "messages": [*USER, {"role": "assistant", "content": "<think>"}],
    "extra_body": {"add_generation_prompt": False, "continue_final_message": True, "stop_token_ids": [0]},
}
THOUGHT = "<think>\nHm, é.\n</think>\n\n"
NUM_THOUGHT_TOKENS = len("<think>\nHm, é.\n</think>".encode())
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
FUNCTION: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def server_config() -> ServerConfig:
    return ServerConfig(reasoning_parser="think")


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ending(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Toy serving whose model has an end, the byte 0."""
    monkeypatch.setattr(ByteTokenizer, "eos_token_ids", frozenset({0}))
    return served


def stopping(text: str) -> Any:
    """The bytes of `text`, and then the model's own end."""
    return lambda request: say(text + "\0")(request)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"messages": USER, "extra_body": {"stop_token_ids": [0]}, **fields}
    return client.chat.completions.create(model="toy", **fields)


def test_a_whole_answer_has_its_thought_beside_it(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping(f"{THOUGHT}Two.")
    answer = ask(client)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("Two.", "stop")
    assert choice.message.reasoning_content == choice.message.reasoning == "Hm, é."
    assert answer.usage.completion_tokens_details.reasoning_tokens == NUM_THOUGHT_TOKENS
    assert answer.usage.completion_tokens == NUM_THOUGHT_TOKENS + len("\n\nTwo.\0")


def test_a_stream_says_the_same(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping(f"{THOUGHT}Two.")
    *chunks, last = list(ask(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    texts = [delta.content or "" for delta in deltas]
    assert ("".join(thoughts), "".join(texts)) == ("Hm, é.", "Two.")
    assert thoughts == [getattr(delta, "reasoning", None) or "" for delta in deltas]
    assert not any(thought and text for thought, text in zip(thoughts, texts, strict=True))
    assert sum(map(bool, thoughts)) == 5  # the space waits: it could belong to the marker
    assert last.usage.completion_tokens_details.reasoning_tokens == NUM_THOUGHT_TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_may_have_opened_the_thought(served: Served, client: openai.OpenAI, stream: bool) -> None:
    served.cluster.answer = stopping("Hm.</think>Two.")
    answer = ask(client, stream=stream, **INSIDE)
    messages = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    assert "".join(getattr(message, "reasoning_content", None) or "" for message in messages) == "Hm."
    assert "".join(message.content or "" for message in messages) == "Two."


def test_an_answer_that_is_cut_within_its_thought_has_no_content(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = say("Hm, tw")
    answer = ask(client, **INSIDE)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.reasoning_content) == (None, "Hm, tw")
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens == 6


def test_an_answer_without_a_thought(served: Served, client: openai.OpenAI) -> None:
    answer = ask(client)
    assert (answer.choices[0].message.content, answer.choices[0].message.reasoning_content) == ("hello", None)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_that_is_not_wanted_is_left_out(served: Served, client: openai.OpenAI, stream: bool) -> None:
    served.cluster.answer = stopping(f"{THOUGHT}Two.")
    answer = ask(client, stream=stream, extra_body={"stop_token_ids": [0], "include_reasoning": False})
    messages = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    assert "".join(message.content or "" for message in messages) == "Two."
    assert not any(getattr(message, "reasoning_content", None) for message in messages)


def test_a_thought_that_is_not_to_be_told_apart_is_text(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping(f"{THOUGHT}Two.")
    answer = ask(client, extra_body={"stop_token_ids": [0], "separate_reasoning": False})
    assert answer.choices[0].message.content == f"{THOUGHT}Two."
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.usage.completion_tokens_details is None


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_read_after_the_thought_alone(served: Served, client: openai.OpenAI, stream: bool) -> None:
    served.cluster.answer = stopping(f"<think>I could write {CALL}.</think>\n{CALL}")
    answer = ask(client, tools=TOOLS, stream=stream)
    messages = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    assert (
        "".join(getattr(message, "reasoning_content", None) or "" for message in messages) == f"I could write {CALL}."
    )
    assert [call.function.name for message in messages for call in message.tool_calls or [] if call.id] == ["f"]
    assert not any(message.content for message in messages)


def test_each_choice_has_its_own_thought(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = say("<think>Hm.</think>Two")
    answer = ask(client, n=2)
    assert [choice.message.content for choice in answer.choices] == ["Two0", "Two1"]
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2 * len("<think>Hm.</think>")


@pytest.mark.parametrize("fields", [{"response_format": {"type": "json_object"}}, {"tools": TOOLS}])
def test_a_grammar_binds_what_comes_after_the_thought(
    served: Served, client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    choice = {"tool_choice": "required"} if "tools" in fields else {}
    ask(client, **fields, **choice)
    ask(client, **INSIDE, **fields, **choice)
    ask(client, **fields, **choice, extra_body={"separate_reasoning": False})
    grammars = [request.sampling.grammar for request in served.cluster.requests]
    leads = [grammar.lead.partition("\n")[0] for grammar in grammars if grammar is not None]
    assert leads == ['start: (SPACE? ("<think>") thought SPACE?)? @answer', "start: thought SPACE? @answer", ""]
    kind = GrammarKind.GRAMMAR if "tools" in fields else GrammarKind.JSON_OBJECT
    assert {grammar.kind for grammar in grammars if grammar is not None} == {kind}


def test_logprobs_of_a_chat_are_those_of_all_tokens(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = say("<think>Hm.</think>Two")
    answer = ask(client, logprobs=True)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


def conversations(monkeypatch: pytest.MonkeyPatch) -> list[Conversation]:
    """Those that are rendered from now on."""
    seen: list[Conversation] = []

    def encode_chat(self: ByteTokenizer, conversation: Conversation) -> list[int]:
        seen.append(conversation)
        return self.encode("x")

    monkeypatch.setattr(ByteTokenizer, "encode_chat", encode_chat)
    return seen


def test_an_earlier_thought_reaches_the_template(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = conversations(monkeypatch)
    for name in ("reasoning_content", "reasoning"):
        messages = [*USER, {"role": "assistant", "content": "Two.", name: "Hm."}, *USER]
        body = {"messages": messages, "max_tokens": 1, "reasoning_effort": "low", "chat_template_kwargs": {"a": 1}}
        assert served.client.post("/v1/chat/completions", json=body).status_code == 200
    assert [conversation.messages[1]["reasoning_content"] for conversation in seen] == ["Hm.", "Hm."]
    assert seen[0].variables == {"reasoning_effort": "low", "a": 1}


EVENTS = [
    "response.created", "response.in_progress",
    "response.output_item.added", "response.content_part.added", *["response.reasoning_text.delta"] * 3,
    "response.reasoning_text.done", "response.content_part.done", "response.output_item.done",
    "response.output_item.added", "response.content_part.added", *["response.output_text.delta"] * 4,
    "response.output_text.done", "response.content_part.done", "response.output_item.done",
    "response.completed",
]  # fmt: skip


def test_a_response_has_an_item_of_its_thought(ending: Served, client: openai.OpenAI) -> None:
    ending.cluster.answer = stopping("<think>Hm.</think>\nTwo.")
    with client.responses.stream(model="toy", input="hi") as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert [event.type for event in events] == EVENTS
    whole = client.responses.create(model="toy", input="hi")
    for answer in (streamed, whole):
        thought, message = answer.output
        assert thought.type == "reasoning" and thought.content is not None
        assert (thought.content[0].text, thought.status, thought.summary) == ("Hm.", "completed", [])
        assert message.type == "message" and answer.output_text == "Two."
        assert answer.usage is not None
        assert answer.usage.output_tokens_details.reasoning_tokens == len("<think>Hm.</think>")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("call", "tokens"), [("", "Two.\0"), (CALL, "Two.")])  # and of its end
def test_log_probabilities_of_a_response_are_those_of_its_text(
    ending: Served, stream: bool, call: str, tokens: str
) -> None:
    ending.cluster.answer = stopping(f"<think>Hm.</think>Two.{call}")
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "stream": stream, "tools": [FUNCTION]}
    answer = ending.client.post("/v1/responses", json=body)
    data = answer.text.strip().rpartition("data: ")[2] if stream else answer.text
    found = json.loads(data)
    (_, message, *calls) = (found["response"] if stream else found)["output"]
    assert "".join(entry["token"] for entry in message["content"][0]["logprobs"]) == tokens
    assert len(calls) == bool(call)


def test_a_response_that_is_cut_within_its_thought(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = say("<think>Hm, tw")
    answer = client.responses.create(model="toy", input="hi")
    (thought,) = answer.output
    assert (thought.type, thought.status, answer.status) == ("reasoning", "incomplete", "incomplete")  # type: ignore[union-attr]


def test_what_came_out_can_go_back_in(ending: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    ending.cluster.answer = stopping(f"<think>Hm.</think>{CALL}")
    first = client.responses.create(model="toy", input="hi", tools=[FUNCTION])
    thought, call = first.output
    assert (thought.type, call.type) == ("reasoning", "function_call")
    ending.cluster.answer = stopping("<think>So.</think>Two.")
    second = client.responses.create(model="toy", input="hi")
    seen = conversations(monkeypatch)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}  # type: ignore[union-attr]
    items: Any = [{"role": "user", "content": "hi"}, *first.output, result, *second.output]
    client.responses.create(model="toy", input=items, reasoning={"effort": "high"})
    (conversation,) = seen
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert [message.get("reasoning_content") for message in conversation.messages] == [None, "Hm.", None, "So."]
    assert conversation.messages[1]["tool_calls"] and conversation.messages[3]["content"] == "Two."
    assert conversation.variables == {"reasoning_effort": "high"}


def test_thoughts_that_follow_each_other_all_go_back_in(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = conversations(monkeypatch)
    thoughts = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]} for text in ("Hm.", "So.")]
    items = [*USER, *thoughts, {"type": "reasoning", "summary": []}, {"role": "assistant", "content": "Two."}]
    assert served.client.post("/v1/responses", json={"input": items, "max_output_tokens": 1}).status_code == 200
    (conversation,) = seen
    assert [message.get("reasoning_content") for message in conversation.messages] == [None, "Hm.\nSo."]
