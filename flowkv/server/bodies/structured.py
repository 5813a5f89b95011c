"""Structured output in a body: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`."""

import json
from typing import Any, Literal

import msgspec

from flowkv.errors import RequestError
from flowkv.types import Grammar, GrammarKind


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """`strict` changes nothing: an answer always follows the schema."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class OutputFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Constraint(msgspec.Struct, frozen=True):
    """What an output must be, and the field of the body that says so."""

    grammar: Grammar
    param: str


def constraint_of(
    output_format: OutputFormat | None, outputs: StructuredOutputs | None, guided: StructuredOutputs
) -> Constraint | None:
    """Raises `RequestError` (400) where a body asks for two things at once, or for one by half."""
    found = [
        *_of_format(output_format),
        *_of_outputs(outputs or StructuredOutputs(), "structured_outputs"),
        *_of_outputs(guided, "guided_{}"),
    ]
    if len(found) > 1:
        names = " and ".join(constraint.param for constraint in found)
        raise RequestError(f"an answer can follow one grammar only, not {names}", param=found[1].param)
    return found[0] if found else None


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema, ensure_ascii=False))


def _of_format(output_format: OutputFormat | None) -> list[Constraint]:
    if output_format is None or output_format.type == "text":
        return []
    if output_format.type == "json_object":
        return [Constraint(Grammar(kind=GrammarKind.JSON_OBJECT), "response_format")]
    if output_format.json_schema is None or output_format.json_schema.schema is None:
        reason = "response_format.json_schema.schema is missing"
        raise RequestError(reason, param="response_format")
    return [Constraint(schema_grammar(output_format.json_schema.schema), "response_format")]


def _of_outputs(outputs: StructuredOutputs, param: str) -> list[Constraint]:
    grammars = {
        "json": None if outputs.json is None else _of_json(outputs.json),
        "json_object": Grammar(kind=GrammarKind.JSON_OBJECT) if outputs.json_object else None,
        "regex": None if outputs.regex is None else Grammar(kind=GrammarKind.REGEX, text=outputs.regex),
        "choice": None
        if outputs.choice is None
        else Grammar(kind=GrammarKind.CHOICE, text=json.dumps(outputs.choice, ensure_ascii=False)),
        "grammar": None if outputs.grammar is None else Grammar(kind=GrammarKind.GRAMMAR, text=outputs.grammar),
    }
    return [Constraint(grammar, param.format(name)) for name, grammar in grammars.items() if grammar is not None]


def _of_json(schema: str | dict[str, Any]) -> Grammar:
    """A schema, or its text."""
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema) if isinstance(schema, str) else schema_grammar(schema)
