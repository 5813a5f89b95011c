"""How one conversation's tools are shown to the model, asked for and read."""

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from flowkv.errors import RequestError
from flowkv.server.bodies.structured import Constraint
from flowkv.server.bodies.tools import NamedTool, Tool, ToolChoice
from flowkv.server.text.tokenizer import Tokenizer
from flowkv.server.tools.bound import Bound, BoundCalls, JsonCalls, TaggedCalls
from flowkv.server.tools.formats import FORMATS, find_format
from flowkv.server.tools.reader import NewReader, PlainReader, ToolReader
from flowkv.server.tools.tool_format import ToolFormat, ToolSchemas

_NO_PARAMETERS: dict[str, Any] = {"properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    shown: list[dict[str, Any]] | None = None  # to the chat template
    new_reader: NewReader = PlainReader
    constraint: Constraint | None = None  # what the answer must be
    markers: tuple[str, ...] = ()  # special tokens that the reader must see
    id_length: int = 24
    opening: tuple[str, str] | None = None  # of a call that nothing binds, which may break off a thought


class ToolPlanner:
    """For one model."""

    def __init__(self, tokenizer: Tokenizer, parser: str) -> None:
        """`parser` as `server.tool_parser`."""
        template = tokenizer.tool_template
        name = find_format(template or "") if parser == "auto" else parser
        self._shows_tools = template is not None
        self._format = None if name is None else FORMATS[name]
        self._bound: BoundCalls = JsonCalls()
        if template is not None and name == "hermes":
            self._bound = TaggedCalls(FORMATS[name], tokenizer.is_token)

    def plan(
        self, tools: list[Tool] | None, choice: ToolChoice | None, asked: Constraint | None, *, parallel: bool
    ) -> ToolPlan:
        """`asked`: what an answer in text must be.

        Raises `RequestError` (400) where the model would never see the tools, or its calls could not be read.
        """
        if not tools or choice == "none":
            return ToolPlan(constraint=asked)
        schemas = {tool.function.name: _schema(tool) for tool in tools}
        shown: list[dict[str, Any]] = [msgspec.to_builtins(tool) for tool in tools]
        if choice in (None, "auto") and asked is None:
            tool_format = self._known_format()
            plan = self._plan(shown, lambda: ToolReader(tool_format, schemas, parallel=parallel), None)
            return replace(plan, opening=tool_format.opening)
        bound = self._bind(schemas, choice, asked, parallel)
        return self._plan(shown, bound.new_reader, bound.constraint)

    def _bind(self, schemas: ToolSchemas, choice: ToolChoice | None, asked: Constraint | None, parallel: bool) -> Bound:
        if isinstance(choice, NamedTool):
            return self._bound.named(schemas, choice.function.name)
        if choice == "required" or asked is None:
            return self._bound.required(schemas, parallel=parallel)
        return self._bound.optional(schemas, asked, parallel=parallel)

    def _plan(self, shown: list[dict[str, Any]], new_reader: NewReader, constraint: Constraint | None) -> ToolPlan:
        if self._format is None:
            return ToolPlan(shown, new_reader, constraint)
        return ToolPlan(shown, new_reader, constraint, self._format.markers, self._format.id_length)

    def _known_format(self) -> ToolFormat:
        enforced = 'with tool_choice "required" or a function\'s name calls are enforced'
        if not self._shows_tools:
            raise RequestError(f"the model's chat template does not show tools; {enforced}", param="tools")
        if self._format is None:
            reason = f"how this model writes tool calls is not known: set server.tool_parser; {enforced}"
            raise RequestError(reason, param="tools")
        return self._format


def _schema(tool: Tool) -> dict[str, Any]:
    """Arguments are an object, said or not."""
    parameters = tool.function.parameters
    return {"type": "object", **(_NO_PARAMETERS if parameters is None else parameters)}
