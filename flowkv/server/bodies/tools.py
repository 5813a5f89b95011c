"""Tools in a body: what a client offers, and what it wants of them."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from flowkv.errors import RequestError

MAX_TOOLS = 128

FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """`parameters` is a JSON schema; left out, there are none. `strict` is taken where calls are bound by a grammar."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: Function


class FunctionChoice(msgspec.Struct, frozen=True):
    name: FunctionName


class NamedTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: FunctionChoice


Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_tools(tools: list[Tool], choice: ToolChoice | None) -> None:
    """Raises `RequestError` (400)."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("tools has two functions of the same name", param="tools")
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise RequestError("tool_choice needs tools to choose from", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise RequestError(f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice")
