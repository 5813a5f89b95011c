import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.errors import RequestError
from flowkv.server.chat_body import decode_chat
from flowkv.server.completion_body import decode_completion

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
    ("ignore_eos", "yes"),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("stream_options", []),
    ("logit_bias", {"5": 1}),
    ("use_beam_search", True),
    ("truncate_prompt_tokens", 5),
    ("response_format", {"type": "json_object"}),
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
    ("messages", [{"role": "tool", "content": "hi"}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
    ("max_tokens", 0),
    ("max_completion_tokens", 0),
    ("logprobs", 1),
    ("top_logprobs", 3),
    ("tools", [{"type": "function"}]),
    ("functions", [{}]),
    ("tool_choice", "required"),
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
        "modalities": ["text"],
        "stop": [],
    }
    assert decode_chat(json.dumps({"messages": USER, **harmless}).encode()).stop_strings == ()


def test_text_parts_are_joined() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = decode_chat(json.dumps({"messages": [{"role": "user", "content": content}]}).encode())
    assert body.messages[0].plain() == {"role": "user", "content": "a\nb"}
