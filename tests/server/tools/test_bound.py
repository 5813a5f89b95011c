"""Grammars of calls allow what their readers read, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from flowkv.errors import RequestError
from flowkv.grammar.compiler import compile_grammar
from flowkv.grammar.vocabulary import Vocabulary
from flowkv.server.bodies.structured import Constraint, schema_grammar
from flowkv.server.tools.bound import Bound, BoundCalls, JsonCalls, TaggedCalls, required_schema
from flowkv.server.tools.formats import FORMATS
from flowkv.types import Grammar, GrammarKind
from tests.server.bpe import make_model_folder
from tests.server.tools.test_formats import Call, joined

POINT = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/X"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"X": {"type": "integer"}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: dict[str, Any] = {"f": POINT, "g.h": NOTHING}
TAGGED = TaggedCalls(FORMATS["hermes"], lambda text: False)
ANSWER = Constraint(schema_grammar({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}), "x")
ONE = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g.h", "arguments": {}}\n</tool_call>'
LISTED = '{"name": "f", "parameters": {"x": 1}}'
CALL_F, CALL_G = ("f", '{"x": 1}'), ("g.h", "{}")


def is_allowed(grammar: Grammar, text: str) -> bool:
    matcher = compile_grammar(grammar, Vocabulary.of_bytes())
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def read(bound: Bound, text: str) -> tuple[str, list[Call]]:
    reader = bound.new_reader()
    return joined([*reader.push(text), *reader.finish()])


@pytest.mark.parametrize(
    ("calls", "bound", "text", "found"),
    [
        (TAGGED, "required", ONE, [CALL_F]),
        (TAGGED, "required", f"{ONE}\n{OTHER}", [CALL_F, CALL_G]),
        (TAGGED, "single", OTHER, [CALL_G]),
        (TAGGED, "named", ONE, [CALL_F]),
        (TAGGED, "optional", f"{OTHER}\n{ONE}", [CALL_G, CALL_F]),
        (JsonCalls(), "required", f'[{LISTED}, {{"name":"g.h","parameters":{{}}}}]', [CALL_F, CALL_G]),
        (JsonCalls(), "single", f"[{LISTED}]", [CALL_F]),
        (JsonCalls(), "named", '{"x": 1}', [CALL_F]),
    ],
)  # fmt: skip
def test_what_is_allowed_is_read(calls: BoundCalls, bound: str, text: str, found: list[Call]) -> None:
    made = make(calls, bound)
    assert is_allowed(made.constraint.grammar, text)
    assert read(made, text) == ("", found)


@pytest.mark.parametrize(
    ("calls", "bound", "text"),
    [
        (TAGGED, "required", ""),
        (TAGGED, "required", "hello"),
        (TAGGED, "required", ONE.replace("1", '"1"')),
        (TAGGED, "required", ONE.replace('"f"', '"h"')),
        (TAGGED, "single", f"{ONE}\n{OTHER}"),
        (TAGGED, "named", OTHER),
        (TAGGED, "optional", '{"a": 1}'),
        (JsonCalls(), "required", "[]"),
        (JsonCalls(), "single", '[{"name": "g.h", "parameters": {}}, {"name":"g.h","parameters":{}}]'),
        (JsonCalls(), "named", "{}"),
    ],
)
def test_what_is_no_call_is_not_allowed(calls: BoundCalls, bound: str, text: str) -> None:
    assert not is_allowed(make(calls, bound).constraint.grammar, text)


def make(calls: BoundCalls, bound: str) -> Bound:
    match bound:
        case "named":
            return calls.named(TOOLS, "f")
        case "optional":
            return calls.optional(TOOLS, ANSWER, parallel=True)
    return calls.required(TOOLS, parallel=bound == "required")


def test_an_answer_instead_of_calls() -> None:
    made = TAGGED.optional(TOOLS, ANSWER, parallel=True)
    assert is_allowed(made.constraint.grammar, '{"a": null}')
    assert read(made, '{"a": null}') == ('{"a": null}', [])


def test_one_of_several_is_taken_as_any_of_them() -> None:
    either = {"oneOf": [{"type": "null"}, {"type": "integer"}]}
    tools = {"f": {"type": "object", "properties": {"x": either}, "required": ["x"]}}
    for calls, text in ((TAGGED, ONE), (JsonCalls(), f"[{LISTED}]")):
        assert is_allowed(calls.required(tools, parallel=False).constraint.grammar, text)


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_an_answer_of_no_schema(text: str) -> None:
    answer = Constraint(Grammar(kind=GrammarKind.JSON_SCHEMA, text=text), "guided_json")
    with pytest.raises(RequestError) as caught:
        TAGGED.optional(TOOLS, answer, parallel=True)
    assert caught.value.param == "guided_json"


@pytest.mark.parametrize("is_special", [False, True])
def test_tags_that_are_tokens(tmp_path: Path, is_special: bool) -> None:
    tokenizer = Tokenizer.from_file(str(make_model_folder(tmp_path) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.add_tokens([AddedToken(tag, special=is_special) for tag in ("<tool_call>", "</tool_call>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    calls = TaggedCalls(FORMATS["hermes"], lambda text: tokenizer.token_to_id(text) is not None)
    grammar = calls.required(TOOLS, parallel=True).constraint.grammar
    ids = tokenizer.encode(f"{ONE}\n{OTHER}", add_special_tokens=False).ids
    assert tokenizer.token_to_id("<tool_call>") in ids
    matcher = compile_grammar(grammar, Vocabulary.of_folder(tmp_path, 0))
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


def test_definitions_move_to_where_references_look() -> None:
    schema = required_schema({"f": POINT, "g": POINT}, parallel=True)
    assert schema["$defs"] == POINT["$defs"]
    assert "$defs" not in json.dumps(schema["items"]).replace("#/$defs", "")
    with pytest.raises(RequestError, match="'X' differently"):
        required_schema({"f": POINT, "g": {"$defs": {"X": {}}}}, parallel=True)
