"""Tools and structured output over HTTP, by the `openai` package and without it."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from flowkv.types import GrammarKind
from tests.server.conftest import Served
from tests.server.fake_cluster import say

USER: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    }
    for name in ("f", "g")
]
TWO_CALLS = (
    'Sure.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def stopping(text: str) -> Any:
    """The bytes of `text`, and then the model's own end."""
    return lambda request: say(text + "\0")(request)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"extra_body": {"stop_token_ids": [0]}, **fields}
    return client.chat.completions.create(model="toy", messages=USER, **fields)


def test_calls_of_a_whole_answer(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping(TWO_CALLS)
    (choice,) = ask(client, tools=TOOLS).choices
    assert (choice.message.content, choice.finish_reason) == ("Sure.", "tool_calls")
    calls = [(call.function.name, call.function.arguments, call.type) for call in choice.message.tool_calls]
    assert calls == [("f", '{"x": 1}', "function"), ("g", "{}", "function")]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert b'tools: [{"type": "function"' in bytes(served.cluster.requests[0].prompt_ids)


def test_calls_of_a_stream(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping(TWO_CALLS)
    with client.chat.completions.stream(
        model="toy", messages=USER, tools=TOOLS, extra_body={"stop_token_ids": [0]}
    ) as stream:
        kinds = [event.type for event in stream]
        (choice,) = stream.get_final_completion().choices
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("tool_calls.function.arguments.delta") > 5
    assert (choice.message.content, choice.finish_reason) == ("Sure.", "tool_calls")
    assert choice.message.tool_calls is not None
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"x": 1}', "{}"]


def test_nothing_of_a_call_is_shown_as_text(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping(TWO_CALLS)
    chunks = list(ask(client, tools=TOOLS, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Sure."
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls if call.id] == [0, 1]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_that_is_cut_short_ended_by_its_length(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = say('<tool_call>{"name": "f", "arguments": {"x": ')
    (choice,) = ask(client, tools=TOOLS).choices
    assert choice.finish_reason == "length"
    assert choice.message.content is None
    assert choice.message.tool_calls[0].function.arguments == '{"x": '


def test_one_call_where_parallel_ones_are_not_wanted(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping(TWO_CALLS)
    (choice,) = ask(client, tools=TOOLS, parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["f"]


def test_text_stays_text(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping("just <text>")
    (choice,) = ask(client, tools=TOOLS).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("just <text>", None, "stop")


def test_tools_that_may_not_be_called_are_not_shown(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping(TWO_CALLS)
    (choice,) = ask(client, tools=TOOLS, tool_choice="none").choices
    assert (choice.message.content, choice.finish_reason) == (TWO_CALLS, "stop")
    assert b"tools:" not in bytes(served.cluster.requests[0].prompt_ids)


def test_required_calls_are_bound_by_a_grammar(served: Served, client: openai.OpenAI) -> None:
    served.cluster.answer = stopping('<tool_call>\n{"name": "g", "arguments": {"x": 2}}\n</tool_call>')
    (choice,) = ask(client, tools=TOOLS, tool_choice="required").choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("g", '{"x": 2}')
    grammar = served.cluster.requests[0].sampling.grammar
    assert grammar is not None and grammar.kind is GrammarKind.GRAMMAR


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called(served: Served, client: openai.OpenAI, stream: bool) -> None:
    served.cluster.answer = stopping('<tool_call>\n{"name": "g", "arguments": {"x": 3}}\n</tool_call>')
    choice = {"type": "function", "function": {"name": "g"}}
    answer = ask(client, tools=TOOLS, tool_choice=choice, stream=stream)
    if stream:
        calls = [call for chunk in answer for call in chunk.choices[0].delta.tool_calls or []]
        assert calls[0].function.name == "g"
        assert "".join(call.function.arguments for call in calls) == '{"x": 3}'
        return
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("g", '{"x": 3}')
    grammar = served.cluster.requests[0].sampling.grammar
    assert grammar is not None
    assert '"const": "g"' in grammar.text and '"const": "f"' not in grammar.text


def test_the_results_of_calls_reach_the_template(served: Served, client: openai.OpenAI) -> None:
    messages: Any = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "42"},
    ]
    client.chat.completions.create(model="toy", messages=messages, tools=TOOLS)
    prompt = bytes(served.cluster.requests[0].prompt_ids)
    assert b'"arguments": {"x": 1}' in prompt
    assert b"tool: 42\n" in prompt


def test_calls_or_an_answer_that_follows_its_format(served: Served, client: openai.OpenAI) -> None:
    for text, content, num_calls in (('{"a": 1}', '{"a": 1}', 0), (TWO_CALLS.removeprefix("Sure.\n"), None, 2)):
        served.cluster.answer = stopping(text)
        (choice,) = ask(client, tools=TOOLS, response_format={"type": "json_object"}).choices
        assert (choice.message.content, len(choice.message.tool_calls or [])) == (content, num_calls)
    grammar = served.cluster.requests[0].sampling.grammar
    assert grammar is not None and "calls | answer" in grammar.text


def test_calls_or_an_answer_that_is_no_json(client: openai.OpenAI) -> None:
    for fields in ({"guided_regex": "a+"}, {"guided_json": "{"}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, tools=TOOLS, extra_body=fields)
        assert caught.value.param in fields


# --- structured output -----------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def test_a_schema_reaches_the_instances(served: Served, client: openai.OpenAI) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    ask(client, response_format=response_format)
    sampling = served.cluster.requests[0].sampling
    assert sampling.grammar is not None
    assert json.loads(sampling.grammar.text) == SCHEMA
    assert 0xFF in sampling.stop_token_ids  # what ends the answers of toy serving that follow a grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {"type": "wrong"}}, "guided_json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"guided_grammar": "start: ("}, "guided_grammar"),
    ],
)
def test_what_no_output_can_follow_is_refused(
    served: Served, client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="toy", prompt="hi", extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, "invalid_grammar")
    assert not served.cluster.requests


def test_logit_bias_reaches_the_instances(served: Served, client: openai.OpenAI) -> None:
    ask(client, logit_bias={"7": -100, "9": 5})
    assert served.cluster.requests[0].sampling.logit_bias == {7: -100.0, 9: 5.0}
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary") as caught:
        ask(client, logit_bias={"512": 1})
    assert caught.value.param == "logit_bias"
