"""Calls between `<tool_call>` tags as a grammar, in Lark as llguidance reads it."""

import json
from collections.abc import Callable
from typing import Any

from flowkv.server.tools.tool_format import ToolSchemas

IsToken = Callable[[str], bool]
# As Python writes JSON, and so as chat templates show it to models.
_AS_TEMPLATES_WRITE = {
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True,
}  # fmt: skip
_DEFINITIONS = ("$defs", "definitions")


def tagged_calls(tools: ToolSchemas, *, parallel: bool, is_token: IsToken) -> str:
    """Rules of which `calls` is one call at least, and no more unless `parallel`."""
    begin, end = (literal(tag, is_token) for tag in ("<tool_call>", "</tool_call>"))
    objects = [json_rule(f"call_{number}", _call(*tool)) for number, tool in enumerate(tools.items())]
    one = " | ".join(f"call_{number}" for number in range(len(tools)))
    return "\n".join(
        [
            r'calls: call ("\n" call)*' if parallel else "calls: call",
            rf'call: {begin} "\n" ({one}) "\n" {end}',
            *objects,
        ]
    )


def json_rule(name: str, schema: Any) -> str:
    """A value that follows a schema. It stands on one line, as Lark takes it."""
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": _AS_TEMPLATES_WRITE}
    return f"{name}: %json {json.dumps(schema)}"


def literal(tag: str, is_token: IsToken) -> str:
    """A token of its own can only be called by its name; else it is text."""
    return tag if is_token(tag) else json.dumps(tag)


def _call(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Definitions move to the top, where references look for them."""
    arguments = {key: value for key, value in parameters.items() if key not in _DEFINITIONS}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        **{key: parameters[key] for key in _DEFINITIONS if key in parameters},
    }
