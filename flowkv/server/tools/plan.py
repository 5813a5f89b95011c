"""How one conversation's tools are shown to the model, asked for and read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from flowkv.errors import RequestError
from flowkv.server.structured import Constraint, schema_grammar
from flowkv.server.tool_body import NamedTool, Tool, ToolChoice
from flowkv.server.tools.formats import FORMATS, find_format
from flowkv.server.tools.json_formats import call_list
from flowkv.server.tools.reader import AnswerReader, NamedReader, PlainReader, ToolReader
from flowkv.server.tools.tool_format import ToolFormat, ToolSchemas

_REQUIRED = ToolFormat(call_list)
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    shown: list[dict[str, Any]] | None = None  # to the chat template
    new_reader: Callable[[], AnswerReader] = PlainReader
    constraint: Constraint | None = None  # where the model has no choice
    markers: tuple[str, ...] = ()  # special tokens that the reader must see
    id_length: int = 24


class ToolPlanner:
    """For one model."""

    def __init__(self, template: str | None, parser: str) -> None:
        """`template`: of the chats with tools, if there is one; `parser`: as `server.tool_parser`."""
        self._has_template = template is not None
        name = find_format(template or "") if parser == "auto" else parser
        self._format = None if name is None else FORMATS[name]

    def plan(self, tools: list[Tool] | None, choice: ToolChoice | None, *, parallel: bool) -> ToolPlan:
        """Raises `RequestError` (400) where the model would never see the tools, or its calls could not be read."""
        if not tools or choice == "none":
            return ToolPlan()
        shown: list[dict[str, Any]] = [msgspec.to_builtins(tool) for tool in tools]
        schemas = {tool.function.name: tool.function.parameters or _NO_PARAMETERS for tool in tools}
        id_length = 24 if self._format is None else self._format.id_length
        if isinstance(choice, NamedTool):
            name = choice.function.name
            constraint = Constraint(schema_grammar(schemas[name]), "tools")
            return ToolPlan(shown, lambda: NamedReader(name), constraint, id_length=id_length)
        if choice == "required":
            constraint = Constraint(schema_grammar(required_schema(schemas, parallel=parallel)), "tools")
            return ToolPlan(
                shown, lambda: ToolReader(_REQUIRED, schemas, parallel=parallel), constraint, id_length=id_length
            )
        found = self._known_format()
        return ToolPlan(
            shown, lambda: ToolReader(found, schemas, parallel=parallel), None, found.markers, found.id_length
        )

    def _known_format(self) -> ToolFormat:
        enforced = 'with tool_choice "required" or a function\'s name calls are enforced'
        if not self._has_template:
            raise RequestError(f"the model's chat template does not show tools; {enforced}", param="tools")
        if self._format is None:
            reason = f"how this model writes tool calls is not known: set server.tool_parser; {enforced}"
            raise RequestError(reason, param="tools")
        return self._format


_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def required_schema(tools: ToolSchemas, *, parallel: bool) -> dict[str, Any]:
    """Of a list of calls, one at least. Definitions move to the top, where references look for them.

    Raises `RequestError` (400) where two functions define different things under one name.
    """
    definitions: dict[str, dict[str, Any]] = {}
    calls = []
    for name, parameters in tools.items():
        for key in _DEFINITIONS:
            _merge(definitions.setdefault(key, {}), parameters.get(key) or {})
        schema = {key: value for key, value in parameters.items() if key not in _DEFINITIONS}
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
            raise RequestError(f"two functions of tools define {name!r} differently", param="tools")
