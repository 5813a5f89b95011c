"""Kimi K2."""

from flowkv.server.tools.feed import Feed, Steps
from flowkv.server.tools.tool_format import ToolSchemas


def parse(feed: Feed, tools: ToolSchemas) -> Steps[None]:
    """A section of calls `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`."""
    while (yield from feed.text_until("<|tool_calls_section_begin|>")):
        yield from feed.space()
        while (yield from feed.literal("<|tool_call_begin|>")):
            yield from feed.space()
            name = yield from feed.name()
            feed.begin_call(name.removeprefix("functions.").partition(":")[0])
            yield from feed.space()
            yield from feed.literal("<|tool_call_argument_begin|>")
            yield from feed.space()
            yield from feed.arguments()
            yield from feed.space()
            yield from feed.literal("<|tool_call_end|>")
            yield from feed.space()
        yield from feed.literal("<|tool_calls_section_end|>")
        yield from feed.space()
