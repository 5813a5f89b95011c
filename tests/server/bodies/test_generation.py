import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.errors import RequestError
from flowkv.server.bodies.chat import decode_chat
from flowkv.server.bodies.completions import decode_completion

USER = [{"role": "user", "content": "hi"}]


def complaint(data: bytes, *, chat: bool = False) -> RequestError:
    with pytest.raises(RequestError) as caught:
        body = decode_chat(data) if chat else decode_completion(data)
        body.prompts() if not chat else None  # type: ignore[union-attr]
    assert caught.value.status == 400
    return caught.value


BAD_FIELDS: list[tuple[str, Any]] = [
    ("max_tokens", -1),
    ("max_tokens", "5"),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("max_tokens", 2**70),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_p", float("nan")),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("n", 0),
    ("n", 10**6),
    ("seed", 2**63),
    ("seed", "lucky"),
    ("priority", 2**30),
    ("priority", 0.5),
    ("stop", ["x"] * 17),
    ("stop", [""]),
    ("stop", ""),
    ("stop", [1]),
    ("stop", {}),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", "x"),
    ("stop_token_ids", [1] * 1025),
    ("ignore_eos", "yes"),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("stream_options", []),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {str(number): 1 for number in range(1025)}),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ("guided_json", 5),
    ("guided_choice", "x"),
    ("structured_outputs", {"regex": 5}),
    ("use_beam_search", True),
    ("truncate_prompt_tokens", 5),
]
BAD_COMPLETION: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", ["a", ""]),
    ("prompt", ["a", 1]),
    ("prompt", [[1], 2]),
    ("prompt", [[1, "a"]]),
    ("prompt", [1, None]),
    ("prompt", None),
    ("prompt", {"text": "a"}),
    ("max_tokens", 0),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("echo", "yes"),
    ("best_of", 3),
    ("suffix", "x"),
    ("prompt_logprobs", 1),
]
BAD_CHAT: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", "hi"),
    ("messages", [{"content": "hi"}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "wizard", "content": "hi"}]),
    ("messages", [{"role": "tool"}]),
    ("messages", [{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
    ("max_tokens", 0),
    ("max_completion_tokens", 0),
    ("logprobs", 1),
    ("top_logprobs", 3),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "function", "function": {"name": "a b"}}]),
    ("tools", [{"type": "web_search"}]),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 2),
    ("tools", [{"type": "function", "function": {"name": f"f{number}"}} for number in range(129)]),
    ("functions", [{}]),
    ("function_call", {"name": "f"}),
    ("tool_choice", "required"),
    ("tool_choice", "some"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("continue_final_message", True),
    ("chat_template_kwargs", {"tools": []}),
    ("modalities", ["audio"]),
    ("audio", {"voice": "x"}),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS + BAD_COMPLETION)
def test_bad_completion_fields_are_named(name: str, value: Any) -> None:
    error = complaint(json.dumps({"prompt": "hi", name: value}).encode())
    assert error.param == name
    assert name in error.message


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS + BAD_CHAT)
def test_bad_chat_fields_are_named(name: str, value: Any) -> None:
    error = complaint(json.dumps({"messages": USER, name: value}).encode(), chat=True)
    assert error.param == name
    assert name in error.message


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"hello",
        b"\xff\xfe",
        b'{"prompt": "\xff", "messages": "\xff"}',
        b'{"prompt": "\\ud800", "messages": "\\ud800"}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"response_format": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"x": NaN, "y": ' + b"[" * 100_000,
    ],
)
def test_what_is_no_body_is_refused(data: bytes, chat: bool) -> None:
    assert complaint(data, chat=chat).message


def test_missing_fields_are_named() -> None:
    assert complaint(b"{}").param == "prompt"
    assert complaint(b"{}", chat=True).param == "messages"


@given(st.binary(max_size=100))
def test_random_bytes_are_refused(data: bytes) -> None:
    complaint(data)
    complaint(data, chat=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([name for name, _ in BAD_FIELDS + BAD_COMPLETION + BAD_CHAT]), json_values)
def test_any_value_is_taken_or_refused(name: str, value: Any) -> None:
    data = json.dumps({"prompt": "hi", "messages": USER, name: value}).encode()
    for decode in (decode_completion, decode_chat):
        try:
            decode(data)
        except RequestError as error:
            assert error.status == 400


def test_prompts_of_every_shape() -> None:
    shapes: list[tuple[Any, list[Any]]] = [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [3]], ["a", [3]]),
    ]
    for prompt, expected in shapes:
        assert decode_completion(json.dumps({"prompt": prompt}).encode()).prompts() == expected


def test_null_and_unknown_fields_are_as_if_left_out() -> None:
    plain = decode_completion(b'{"prompt": "a"}')
    nulls = {name: None for name, _ in BAD_FIELDS}
    assert decode_completion(json.dumps({"prompt": "a", "user": "me", "wizard": [1], **nulls}).encode()) == plain


def test_harmless_forms_of_unsupported_fields_pass() -> None:
    harmless = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "structured_outputs": {},
        "modalities": ["text"],
        "stop": [],
    }
    assert decode_chat(json.dumps({"messages": USER, **harmless}).encode()).stop_strings == ()


def test_text_parts_are_joined() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = decode_chat(json.dumps({"messages": [{"role": "user", "content": content}]}).encode())
    assert body.messages[0].plain() == {"role": "user", "content": "a\nb"}


TOOL_MESSAGES = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "name": "f", "content": "2"},
    {"role": "assistant", "content": "so", "reasoning_content": "hm"},
]


def test_messages_of_tools_are_as_templates_take_them() -> None:
    body = decode_chat(json.dumps({"messages": TOOL_MESSAGES}).encode())
    assert [message.plain() for message in body.messages] == [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "2", "name": "f", "tool_call_id": "a"},
        {"role": "assistant", "content": "so", "reasoning_content": "hm", "thinking": "hm"},
    ]


@pytest.mark.parametrize("arguments", ["{", "[1]", "5", "[" * 100_000, "{" * 900, '{"a": "\\ud83d"}'])
def test_arguments_that_are_no_object_stay_what_they_are(arguments: str) -> None:
    """As a model may have written them in the turn before, or been cut short."""
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    body = decode_chat(json.dumps({"messages": [{"role": "assistant", "tool_calls": calls}]}).encode())
    assert body.messages[0].plain()["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(("content", "text"), [(None, ""), ([], ""), ([{"type": "refusal", "refusal": "No."}], "No.")])
def test_an_assistant_may_have_said_nothing_or_refused(content: Any, text: str) -> None:
    body = decode_chat(json.dumps({"messages": [{"role": "assistant", "content": content}]}).encode())
    assert body.messages[0].plain() == {"role": "assistant", "content": text}


def test_a_body_that_is_nested_too_deeply_is_refused_before_it_is_decoded() -> None:
    for depth in (950, 199, 198):  # Python's own limit is near 1000
        variables = '{"a":' * depth + "1" + "}" * depth
        data = f'{{"messages": [{{"role": "user", "content": "{"[" * 300}"}}], "chat_template_kwargs": {variables}}}'
        if depth == 950:
            error = complaint(data.encode(), chat=True)
            assert error.code == "invalid_json" and "nested" in error.message
        else:
            decode_chat(data.encode())


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x"}] * 4097,
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 4097}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 2049}] * 2,
    ],
    ids=["messages", "parts", "calls"],
)
def test_a_conversation_has_no_more_parts_than_one_can_go_through(messages: Any) -> None:
    assert complaint(json.dumps({"messages": messages}).encode(), chat=True).param == "messages"


def test_a_long_body_that_is_no_json_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("json.loads", lambda data: pytest.fail(f"{len(data)} bytes"))
    assert complaint(b'{"a": [' + b"1.5," * 20_000).code == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "kind", "text", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", "", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}, "strict": True}}},
            "json_schema", '{"type": "null"}', "response_format",
        ),
        ({"guided_json": {"type": "null"}}, "json_schema", '{"type": "null"}', "guided_json"),
        ({"guided_json": '{"type":"null"}'}, "json_schema", '{"type":"null"}', "guided_json"),
        ({"guided_regex": "a+"}, "regex", "a+", "guided_regex"),
        ({"guided_choice": ["a", "é"]}, "choice", '["a", "é"]', "guided_choice"),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"', "guided_grammar"),
        ({"structured_outputs": {"json": {}}}, "json_schema", "{}", "structured_outputs"),
        ({"structured_outputs": {"json_object": True}}, "json_object", "", "structured_outputs"),
        ({"structured_outputs": {"regex": "b"}}, "regex", "b", "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]', "structured_outputs"),
        ({"structured_outputs": {"grammar": "x"}}, "grammar", "x", "structured_outputs"),
    ],
)  # fmt: skip
def test_structured_output_in_each_of_its_forms(fields: dict[str, Any], kind: str, text: str, param: str) -> None:
    constraint = decode_completion(json.dumps({"prompt": "a", **fields}).encode()).constraint
    assert constraint is not None
    assert (constraint.grammar.kind, constraint.grammar.text, constraint.param) == (kind, text, param)


def test_two_grammars_at_once_are_refused() -> None:
    body = {"prompt": "a", "guided_regex": "a", "response_format": {"type": "json_object"}}
    assert complaint(json.dumps(body).encode()).param == "guided_regex"
