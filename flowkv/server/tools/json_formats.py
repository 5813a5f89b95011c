"""Calls that are JSON, name and all."""

from flowkv.server.tools.feed import Feed, Steps
from flowkv.server.tools.tool_format import Parse, ToolSchemas


def between_tags(feed: Feed, tools: ToolSchemas) -> Steps[None]:
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, any number of them: Hermes, Qwen."""
    while (yield from feed.text_until("<tool_call>")):
        yield from feed.space()
        if not (yield from feed.call_object()):
            feed.refuse("<tool_call>")
            continue
        yield from feed.space()
        yield from feed.literal("</tool_call>")
        yield from feed.space()


def bare_json(feed: Feed, tools: ToolSchemas) -> Steps[None]:
    """An answer that is one object, or several with `;` between them: Llama 3.

    It must name a function that is offered, since an answer may be JSON without being a call.
    """
    has_tag = yield from feed.literal("<|python_tag|>")
    if not (yield from feed.attempt(_bare_call(feed, tools))):
        feed.show("<|python_tag|>" if has_tag else "")
    else:
        while (yield from feed.attempt(_following_call(feed, tools))):
            pass
        yield from feed.space()
    yield from feed.rest()


def _bare_call(feed: Feed, tools: ToolSchemas) -> Steps[bool]:
    yield from feed.space()
    return (yield from feed.call_object(tools.__contains__))


def _following_call(feed: Feed, tools: ToolSchemas) -> Steps[bool]:
    yield from feed.space()
    if not (yield from feed.literal(";")):
        return False
    yield from feed.space()
    return (yield from feed.call_object(tools.__contains__))


def call_list(feed: Feed, tools: ToolSchemas) -> Steps[None]:
    """An answer that is a list of calls, as `tool_choice` "required" makes a model write it."""
    yield from feed.space()
    yield from feed.call_list()
    yield from feed.space()
    yield from feed.rest()


def marked_list(marker: str, end: str = "") -> Parse:
    """A marker and a list of calls: Granite, Phi 4, Nemotron, Jamba."""

    def parse(feed: Feed, tools: ToolSchemas) -> Steps[None]:
        while (yield from feed.text_until(marker)):
            yield from feed.space()
            if not (yield from feed.call_list()):
                feed.refuse(marker)
                continue
            yield from feed.space()
            yield from feed.literal(end)
            yield from feed.space()

    return parse


def mistral(feed: Feed, tools: ToolSchemas) -> Steps[None]:
    """`[TOOL_CALLS]` and a list of calls, or `[TOOL_CALLS]name[ARGS]{...}` for each."""
    while (yield from feed.text_until("[TOOL_CALLS]")):
        yield from feed.space()
        if not (yield from feed.call_list()) and not (yield from feed.attempt(_named_call(feed))):
            feed.refuse("[TOOL_CALLS]")
            continue
        yield from feed.space()


def _named_call(feed: Feed) -> Steps[bool]:
    name = yield from feed.name()
    if (yield from feed.literal("[CALL_ID]")):
        yield from feed.name()
    has_mark = yield from feed.literal("[ARGS]")
    if not name or not (has_mark or (yield from feed.is_next("{"))):
        return False
    feed.begin_call(name)
    yield from feed.space()
    yield from feed.arguments()
    return True
