"""What a format of tool calls is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowkv.server.tools.feed import Feed, Steps

ToolSchemas = dict[str, dict[str, Any]]  # of the functions that the client offers: their parameters, by name
Parse = Callable[[Feed, ToolSchemas], Steps[None]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    parse: Parse
    signs: tuple[str, ...] = ()  # all of them are in the chat templates of its models
    markers: tuple[str, ...] = ()  # special tokens that must not be left out of the text
    id_length: int = 24  # of a call's id
    opening: tuple[str, str] | None = None  # marker and text after it with which calls break off thoughts
