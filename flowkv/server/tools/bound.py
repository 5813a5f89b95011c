"""Answers that a grammar binds to be calls: in the model's own format where that can be, else in plain JSON."""

from dataclasses import dataclass
from typing import Any, Protocol

from flowkv.errors import RequestError
from flowkv.server.bodies.structured import Constraint, schema_grammar
from flowkv.server.text.json_text import loads_strict
from flowkv.server.tools.json_formats import call_list
from flowkv.server.tools.reader import NamedReader, NewReader, ToolReader
from flowkv.server.tools.tagged_grammar import IsToken, json_rule, tagged_calls
from flowkv.server.tools.tool_format import ToolFormat, ToolSchemas
from flowkv.types import Grammar, GrammarKind

DEFINITIONS = ("$defs", "definitions")
_LIST = ToolFormat(call_list)
_FIELD = "tools"  # of the body, which is to blame where such a grammar cannot be


@dataclass(frozen=True, slots=True)
class Bound:
    constraint: Constraint
    new_reader: NewReader


class BoundCalls(Protocol):
    """`tools` are never empty. All raise `RequestError` (400) where it cannot be."""

    def required(self, tools: ToolSchemas, *, parallel: bool) -> Bound:
        """One call at least, and one at most unless `parallel`."""
        ...

    def named(self, tools: ToolSchemas, name: str) -> Bound:
        """A call of this function."""
        ...

    def optional(self, tools: ToolSchemas, answer: Constraint, *, parallel: bool) -> Bound:
        """Calls, or else an answer that follows its own grammar."""
        ...


class TaggedCalls:
    """For models that write `<tool_call>`."""

    def __init__(self, tool_format: ToolFormat, is_token: IsToken) -> None:
        self._format = tool_format
        self._is_token = is_token

    def required(self, tools: ToolSchemas, *, parallel: bool) -> Bound:
        return self._bound("start: calls", tools, parallel)

    def named(self, tools: ToolSchemas, name: str) -> Bound:
        return self._bound("start: calls", {name: tools[name]}, False)

    def optional(self, tools: ToolSchemas, answer: Constraint, *, parallel: bool) -> Bound:
        return self._bound(f"start: calls | answer\n{json_rule('answer', _schema(answer))}", tools, parallel)

    def _bound(self, start: str, tools: ToolSchemas, parallel: bool) -> Bound:
        rules = tagged_calls(tools, parallel=parallel, is_token=self._is_token)
        grammar = Grammar(kind=GrammarKind.GRAMMAR, text=f"{start}\n{rules}")
        return Bound(Constraint(grammar, _FIELD), lambda: ToolReader(self._format, tools, parallel=parallel))


class JsonCalls:
    """For any model: a list of calls, or the arguments alone."""

    def required(self, tools: ToolSchemas, *, parallel: bool) -> Bound:
        grammar = schema_grammar(required_schema(tools, parallel=parallel))
        return Bound(Constraint(grammar, _FIELD), lambda: ToolReader(_LIST, tools, parallel=parallel))

    def named(self, tools: ToolSchemas, name: str) -> Bound:
        return Bound(Constraint(schema_grammar(tools[name]), _FIELD), lambda: NamedReader(name))

    def optional(self, tools: ToolSchemas, answer: Constraint, *, parallel: bool) -> Bound:
        raise _either_or(answer)


def required_schema(tools: ToolSchemas, *, parallel: bool) -> dict[str, Any]:
    """Of a list of calls. Definitions move to the top, where references look for them.

    Raises `RequestError` (400) where two functions define different things under one name.
    """
    definitions: dict[str, dict[str, Any]] = {}
    calls = []
    for name, parameters in tools.items():
        for key in DEFINITIONS:
            _merge(definitions.setdefault(key, {}), parameters.get(key) or {})
        schema = {key: value for key, value in parameters.items() if key not in DEFINITIONS}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    bounds = {"minItems": 1} if parallel else {"minItems": 1, "maxItems": 1}
    found = {key: value for key, value in definitions.items() if value}
    return {"type": "array", **bounds, "items": {"anyOf": calls}, **found}


def _merge(known: dict[str, Any], more: dict[str, Any]) -> None:
    for name, definition in more.items():
        if known.setdefault(name, definition) != definition:
            raise RequestError(f"two functions of tools define {name!r} differently", param=_FIELD)


def _schema(answer: Constraint) -> Any:
    """Raises `RequestError` (400) where it has none."""
    match answer.grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return {"type": "object"}
        case GrammarKind.JSON_SCHEMA:
            try:
                return loads_strict(answer.grammar.text)
            except ValueError as error:
                raise RequestError(f"{answer.param}: {error}", param=answer.param, code="invalid_grammar") from error
        case _:
            raise _either_or(answer)


def _either_or(answer: Constraint) -> RequestError:
    reason = f'{answer.param} would keep the model from calling tools: set tool_choice to "none" or "required"'
    return RequestError(reason, param=answer.param)
