"""DeepSeek V3 and V3.1."""

from flowkv.server.tools.feed import Feed, Steps
from flowkv.server.tools.tool_format import ToolSchemas

CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END = (
    f"<\uff5c{words}\uff5c>".replace(" ", "\u2581")
    for words in ("tool calls begin", "tool call begin", "tool sep", "tool call end", "tool calls end")
)


def parse(feed: Feed, tools: ToolSchemas) -> Steps[None]:
    """V3: `function<sep>name` and arguments between code fences; V3.1: `name<sep>{...}`."""
    while (yield from feed.text_until(CALLS_BEGIN)):
        yield from feed.space()
        if not (yield from feed.literal(CALL_BEGIN)):
            feed.refuse(CALLS_BEGIN)
            continue
        while True:
            yield from _call(feed)
            yield from feed.literal(CALL_END)
            yield from feed.space()
            if not (yield from feed.literal(CALL_BEGIN)):
                break
        yield from feed.literal(CALLS_END)
        yield from feed.space()


def _call(feed: Feed) -> Steps[None]:
    name = yield from feed.name()
    yield from feed.literal(SEPARATOR)
    if not (yield from feed.is_next("{")):
        name = yield from feed.name()
    feed.begin_call(name)
    yield from feed.space()
    yield from feed.literal("```json")
    yield from feed.space()
    yield from feed.arguments()
    yield from feed.space()
    yield from feed.literal("```")
