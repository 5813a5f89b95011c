"""What a grammar lets come before the answer that it binds: a thought, in Lark as llguidance reads it."""

import re

from flowkv.server.reasoning.thought_format import ThoughtFormat
from flowkv.server.tools.tagged_grammar import IsToken, literal

_NAME = re.compile(r"<[^<>\s]+>")
_SPACE = r"SPACE: /[ \t\r\n]{1,16}/"


def thought_lead(thought_format: ThoughtFormat, is_token: IsToken, *, is_open: bool) -> str:
    """A `Grammar.lead`, whose thought may be left out unless `is_open`.

    Empty where a marker is a token that Lark has no name for: the answer is bound from its first token then.
    """
    if any(is_token(marker) and not _NAME.fullmatch(marker) for marker in thought_format.markers):
        return ""
    thought = [*_thought(thought_format.closings, is_token), _SPACE]
    if is_open:
        return "\n".join(["start: thought SPACE? @answer", *thought])
    opening = " | ".join(literal(marker, is_token) for marker in thought_format.openings)
    return "\n".join([f"start: (SPACE? ({opening}) thought SPACE?)? @answer", *thought])


def _thought(closings: tuple[str, ...], is_token: IsToken) -> list[str]:
    """A token of its own is no text, so that it ends any; other markers end what is as short as can be."""
    if all(is_token(marker) for marker in closings):
        return [f"thought: TEXT? ({' | '.join(closings)})", "TEXT: /(?s:.+)/"]
    ends = "|".join(re.escape(marker).replace("/", r"\/") for marker in closings)
    return [f"thought[lazy]: /(?s:.*)({ends})/"]
