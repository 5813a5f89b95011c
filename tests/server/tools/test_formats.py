import json
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.server.tools import deepseek, feed
from flowkv.server.tools.feed import MAX_GAP, MAX_WASTED, Arguments, CallBegin, Piece, Text
from flowkv.server.tools.formats import FORMATS, find_format
from flowkv.server.tools.json_formats import call_list
from flowkv.server.tools.json_scanner import JsonScanner
from flowkv.server.tools.reader import NamedReader, ToolReader
from flowkv.server.tools.tool_format import ToolFormat

TOOLS: dict[str, Any] = {
    "f": {"properties": {"x": {"type": "integer"}, "s": {"type": "string"}}},
    "g.h": {},
}
DEEP = (deepseek.CALLS_BEGIN, deepseek.CALL_BEGIN, deepseek.SEPARATOR, deepseek.CALL_END, deepseek.CALLS_END)
Call = tuple[str, str]

# (format, text, what is left of it, calls)
CASES: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", 'Hm. \n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "Hm.", [("f", '{"x": 1}')]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"s": "a}\\"<tool_call>"}}</tool_call>\n'
        '<tool_call>\n{"arguments": {}, "name": "g.h"}\n</tool_call> ok ',
        "ok ",
        [("f", '{"s": "a}\\"<tool_call>"}'), ("g.h", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + "[" * 5000, "", [("f", "[" * 5000)]),
    ("hermes", r'<tool_call>{"name": "\ud83d"}', r'<tool_call>{"name": "\ud83d"}', []),
    ("hermes", r'<tool_call>{"name": "f", "arguments": "\ud83d"}', "", [("f", r'"\ud83d"')]),
    ("hermes", "a <tool_call> b", "a <tool_call> b", []),
    ("hermes", 'a <tool_call>{"nam', 'a <tool_call>{"nam', []),
    ("hermes", '<tool_call>{"name": 5}', '<tool_call>{"name": 5}', []),
    ("hermes", 'x <tool_call>{"name": "f", "arguments": {"x": [1, {', "x", [("f", '{"x": [1, {')]),
    ("hermes", "just <tool words < here \n", "just <tool words < here \n", []),
    ("llama3_json", '{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g.h", "parameters": {"y": [2]}}\n',
        "",
        [("f", "{}"), ("g.h", '{"y": [2]}')],
    ),
    ("llama3_json", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama3_json", ' It is {"name": "f"}', ' It is {"name": "f"}', []),
    ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]', "", [("f", '{"x": 1}')]),
    (
        "mistral",
        'Well[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g.h", "arguments": {"a": "]"}}]',
        "Well",
        [("f", "{}"), ("g.h", '{"a": "]"}')],
    ),
    (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g.h[CALL_ID]abc123[ARGS]{}',
        "",
        [("f", '{"x": 1}'), ("g.h", "{}")],
    ),
    ("mistral", '[TOOL_CALLS]f{"x": 1}', "", [("f", '{"x": 1}')]),
    ("mistral", "[TOOL_CALLS] what? [1, 2]", "[TOOL_CALLS] what? [1, 2]", []),
    ("granite", '<|tool_call|>[{"name": "f", "arguments": {"x": 1}}]', "", [("f", '{"x": 1}')]),
    ("phi4_mini_json", 'functools[{"name": "f", "arguments": {"x": 1}}]', "", [("f", '{"x": 1}')]),
    ("nemotron", '<TOOLCALL>[{"name": "f", "arguments": {"x": 1}}]</TOOLCALL>', "", [("f", '{"x": 1}')]),
    ("jamba", '<tool_calls>[\n  {"name": "f", "arguments": {}}\n]</tool_calls>', "", [("f", "{}")]),
    (
        "deepseek_v3",
        f'So:{DEEP[0]}{DEEP[1]}function{DEEP[2]}f\n```json\n{{"x": 1}}\n```{DEEP[3]}\n'
        f"{DEEP[1]}function{DEEP[2]}g.h\n```json\n{{}}\n```{DEEP[3]}{DEEP[4]}",
        "So:",
        [("f", '{"x": 1}'), ("g.h", "{}")],
    ),
    ("deepseek_v3", f'{DEEP[0]}{DEEP[1]}f{DEEP[2]}{{"x": 1}}{DEEP[3]}{DEEP[4]}', "", [("f", '{"x": 1}')]),
    (
        "kimi_k2",
        'Hm<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}'
        "<|tool_call_end|><|tool_call_begin|>functions.h:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "Hm",
        [("f", '{"x": 1}'), ("h", "{}")],
    ),
    (
        "qwen3_coder",
        "I see.\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=s>\n1\n2\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call><function=g.h></function></tool_call>",
        "I see.",
        [("f", '{"x": 1, "s": "1\\n2"}'), ("g.h", "{}")],
    ),
    (
        "glm45",
        "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n<arg_key>s</arg_key>\n<arg_value>é</arg_value>\n"
        "</tool_call>",
        "",
        [("f", '{"x": 1, "s": "é"}')],
    ),
]
named_cases = pytest.mark.parametrize(("name", "text", "rest", "calls"), CASES, ids=range(len(CASES)))


def reader(name: str, *, parallel: bool = True) -> ToolReader:
    return ToolReader(FORMATS[name], TOOLS, parallel=parallel)


def joined(pieces: list[Piece]) -> tuple[str, list[Call]]:
    text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    calls: list[Call] = []
    for piece in pieces:
        if isinstance(piece, CallBegin):
            calls.append((piece.name, ""))
        elif isinstance(piece, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return text, calls


def read(tool_reader: ToolReader, parts: list[str]) -> tuple[str, list[Call]]:
    pieces = [piece for part in parts for piece in tool_reader.push(part)]
    return joined(pieces + tool_reader.finish())


@named_cases
def test_what_a_text_says(name: str, text: str, rest: str, calls: list[Call]) -> None:
    assert read(reader(name), [text]) == (rest, calls)


@named_cases
def test_a_character_at_a_time(name: str, text: str, rest: str, calls: list[Call]) -> None:
    assert read(reader(name), list(text)) == (rest, calls)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.sampled_from(CASES), st.lists(st.integers(0, 10_000), max_size=8))
def test_any_cut_says_the_same(case: tuple[str, str, str, list[Call]], places: list[int]) -> None:
    name, text, rest, calls = case
    assert read(reader(name), cut(text, places)) == (rest, calls)


SNIPPETS = sorted(
    {
        '{"name": "f", "arguments": ',
        '{"x": 1}',
        "}",
        "[",
        "]",
        '"',
        "\\",
        " ",
        " " * 70,
        "\n",
        ";",
        ",",
        "f",
        "é",
        "word",
    }
    | {marker for known in FORMATS.values() for marker in known.markers}
    | {"functools", "<function=f>", "<parameter=x>", "</parameter>", "</function>", "<arg_key>", "</arg_key>"}
)


@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.sampled_from(SNIPPETS), max_size=14).map("".join),
    st.lists(st.integers(0, 10_000), max_size=8),
    st.sampled_from([MAX_WASTED, 20]),
)
def test_any_text_is_read_and_any_cut_of_it_says_the_same(
    name: str, text: str, places: list[int], max_wasted: int
) -> None:
    with patch.object(feed, "MAX_WASTED", max_wasted):
        assert read(reader(name), cut(text, places)) == read(reader(name), [text])


@pytest.mark.parametrize("name", ["hermes", "mistral", "granite", "llama3_json"])
@pytest.mark.parametrize("end", ["", "]" * 2000 + "x"], ids=["within", "beyond"])
def test_what_looks_like_calls_within_calls_is_not_read_again_and_again(
    name: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Counter[str]()
    scan = JsonScanner.scan

    def counting(self: JsonScanner, text: str, at: int) -> int:
        stop = scan(self, text, at)
        reads["characters"] += stop - at
        return stop

    monkeypatch.setattr(JsonScanner, "scan", counting)
    marker = FORMATS[name].markers[0] + ("[" if name in ("mistral", "granite") else "")
    text = f'{marker}{{"a":[' * 1000 + end
    rest, calls = read(reader(name), cut(text, list(range(0, len(text), 500))))
    assert calls == [] and rest.startswith(marker) and reads["characters"] < 2 * (len(text) + MAX_WASTED)


def test_white_space_that_may_stand_before_a_call_is_held_back_within_bounds() -> None:
    tool_reader = reader("hermes")
    shown = [len(joined(tool_reader.push(" "))[0]) for _ in range(100)]
    assert sum(shown) == 100 - MAX_GAP
    assert joined(tool_reader.push('<tool_call>{"name": "f"}'))[0] == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.tuples(st.sampled_from(["f", "g.h"]), st.dictionaries(st.text(), json_values, max_size=4)), min_size=1),
    st.sampled_from(["hermes", "llama3_json", "mistral"]),
    st.booleans(),
)
def test_calls_come_back_as_they_were_written(
    calls: list[tuple[str, dict[str, Any]]], name: str, is_ascii: bool
) -> None:
    objects = [
        json.dumps({"name": function, "arguments": arguments}, ensure_ascii=is_ascii) for function, arguments in calls
    ]
    texts = {
        "hermes": "".join(f"<tool_call>\n{text}\n</tool_call>\n" for text in objects),
        "llama3_json": "; ".join(objects),
        "mistral": "[TOOL_CALLS][" + ", ".join(objects) + "]",
    }
    rest, found = read(reader(name), list(texts[name]))
    assert rest == ""
    assert [(function, json.loads(arguments)) for function, arguments in found] == calls


def test_arguments_are_shown_as_they_come() -> None:
    tool_reader = reader("hermes")
    assert tool_reader.push('<tool_call>{"name": "f", "argu') == [CallBegin("f")]
    assert tool_reader.push('ments": {"x": ') == [Arguments('{"x": ')]
    assert tool_reader.push("1}") == [Arguments("1}")]


def test_only_what_may_begin_a_call_is_held_back() -> None:
    tool_reader = reader("hermes")
    assert tool_reader.push("a < b <tool") == [Text("a < b")]
    assert tool_reader.push("s>") == [Text(" <tools>")]


def test_one_call_where_several_are_not_wanted() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 3 + "!"
    assert read(reader("hermes", parallel=False), [text]) == ("!", [("f", "{}")])


def test_required_calls_are_a_list() -> None:
    text = '[{"name": "f", "parameters": {"x": 1}}, {"name": "g.h", "parameters": {}}]'
    tool_reader = ToolReader(ToolFormat(call_list), TOOLS, parallel=True)
    assert read(tool_reader, list(text)) == ("", [("f", '{"x": 1}'), ("g.h", "{}")])


def test_a_named_function_takes_all_text() -> None:
    named = NamedReader("f")
    assert joined([*named.push('{"x"'), *named.push(": 1}"), *named.finish()]) == ("", [("f", '{"x": 1}')])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% for tool in tools %}<tool_call>{{ tool | tojson }}", "hermes"),
        ("<tool_call>\n<function=example>\n<parameter=x>", "qwen3_coder"),
        ("[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary}', "llama3_json"),
        ("{{ messages }}", None),
    ],
)
def test_a_template_shows_its_format(template: str, name: str | None) -> None:
    assert find_format(template) == name
