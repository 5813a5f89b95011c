"""Calls whose arguments are plain text between tags."""

import json
from typing import Any

from flowkv.server.text.json_text import loads_strict
from flowkv.server.tools.feed import Feed, Steps
from flowkv.server.tools.tool_format import ToolSchemas


def qwen3_coder(feed: Feed, tools: ToolSchemas) -> Steps[None]:
    """`<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>`; values are plain text."""
    while (yield from feed.text_until("<tool_call>")):
        yield from feed.space()
        name = (yield from feed.raw_until(">")) if (yield from feed.literal("<function=")) else None
        if name is None:
            feed.refuse("<tool_call>")
            continue
        feed.begin_call(name)
        arguments = PlainArguments(feed, tools.get(name, {}))
        yield from feed.space()
        while (yield from feed.literal("<parameter=")):
            key = yield from feed.raw_until(">")
            value = yield from feed.raw_until("</parameter>")
            if key is None or value is None:
                break
            arguments.add(key, value.removeprefix("\n").removesuffix("\n"))
            yield from feed.space()
        arguments.end()
        for tag in ("</function>", "</tool_call>"):
            yield from feed.literal(tag)
            yield from feed.space()


def glm(feed: Feed, tools: ToolSchemas) -> Steps[None]:
    """`<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>`; values are plain text."""
    while (yield from feed.text_until("<tool_call>")):
        yield from feed.space()
        name = yield from feed.name()
        if not name:
            feed.refuse("<tool_call>")
            continue
        feed.begin_call(name)
        arguments = PlainArguments(feed, tools.get(name, {}))
        yield from feed.space()
        while (yield from feed.literal("<arg_key>")):
            key = yield from feed.raw_until("</arg_key>")
            yield from feed.space()
            yield from feed.literal("<arg_value>")
            value = yield from feed.raw_until("</arg_value>")
            if key is None or value is None:
                break
            arguments.add(key.strip(), value)
            yield from feed.space()
        arguments.end()
        yield from feed.literal("</tool_call>")
        yield from feed.space()


class PlainArguments:
    """A JSON object from values that are written as plain text: what is no string by its schema is read as JSON."""

    def __init__(self, feed: Feed, schema: dict[str, Any]) -> None:
        self._feed = feed
        properties = schema.get("properties")
        self._properties: dict[str, Any] = properties if isinstance(properties, dict) else {}
        self._separator = "{"

    def add(self, key: str, text: str) -> None:
        value = json.dumps(self._read(key, text), ensure_ascii=False)
        self._feed.show_arguments(f"{self._separator}{json.dumps(key, ensure_ascii=False)}: {value}")
        self._separator = ", "

    def end(self) -> None:
        self._feed.show_arguments("{}" if self._separator == "{" else "}")

    def _read(self, key: str, text: str) -> Any:
        schema = self._properties.get(key)
        if not isinstance(schema, dict) or schema.get("type", "string") == "string":
            return text
        try:
            return loads_strict(text)
        except ValueError:
            return text
