"""How models mark their thoughts. Formats are found by signs of them in the chat template."""

from dataclasses import dataclass
from enum import Enum, auto

from flowkv.server.tools.feed import Feed, Steps


class Beginning(Enum):
    """Where an answer begins."""

    INSIDE = auto()  # the prompt has opened the thought
    BEFORE = auto()  # the model may open one
    AFTER = auto()  # the prompt has closed it, or goes on with an answer


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """`closings` end a thought; `openings` begin one, at the very beginning of an answer."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    is_always_open: bool = False  # the model thinks though neither its prompt nor itself says that it does

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.openings, *self.closings)

    def beginning(self, prompt_end: str, continued: str) -> Beginning:
        """`prompt_end` is the prompt's last text, `continued` what of it the assistant is said to have written."""
        if continued.strip():
            is_open = _last(continued, self.openings) > _last(continued, self.closings)
            return Beginning.INSIDE if is_open else Beginning.AFTER
        text = prompt_end.rstrip()
        if text.endswith(self.closings):
            return Beginning.AFTER
        return Beginning.INSIDE if self.is_always_open or text.endswith(self.openings) else Beginning.BEFORE


_TAGS = ("<think>",), ("</think>",)

FORMATS: dict[str, ThoughtFormat] = {  # looked for in this order
    "think": ThoughtFormat(*_TAGS),
    "deepseek_r1": ThoughtFormat(*_TAGS, is_always_open=True),
    "granite": ThoughtFormat(
        ("Here is my thought process:", "Here's my thought process:"), ("Here is my response:", "Here's my response:")
    ),
    "kimi": ThoughtFormat(("\u25c1think\u25b7",), ("\u25c1/think\u25b7",)),
    "mistral": ThoughtFormat(("[THINK]",), ("[/THINK]",)),
    "seed_oss": ThoughtFormat(
        ("<seed:think>", "<seed:think><seed:cot_budget_reflect>"),  # the latter ends prompts with a budget of 0
        ("</seed:think>",),
    ),
}
_SIGNS = {
    "think": "</think>", "granite": "Here is my thought process:", "kimi": "\u25c1/think\u25b7",
    "mistral": "[/THINK]", "seed_oss": "</seed:think>",
}  # fmt: skip


def find_format(template: str) -> str | None:
    """The name of the format that a chat template teaches its model."""
    return next((name for name, sign in _SIGNS.items() if sign in template), None)


@dataclass(frozen=True, slots=True)
class ThoughtStart:
    """Of one answer. Where the thought is open, the model may open it once more; a `call` breaks it off."""

    format: ThoughtFormat
    is_open: bool
    call: tuple[str, str] | None = None  # a marker, and what follows it


def opens(feed: Feed, start: ThoughtStart) -> Steps[bool]:
    """Reads a thought's opening; False, and nothing is read: there is no thought."""
    return (yield from feed.attempt(_opening(feed, start.format.openings))) or start.is_open


def thought(feed: Feed, start: ThoughtStart) -> Steps[None]:
    """Shows a thought that is open without its closing marker and white space beside its markers."""
    yield from feed.space()
    call, head = start.call or ("", "")
    markers = (*start.format.closings, call) if call else start.format.closings
    while (marker := (yield from feed.text_until(*markers))) and marker == call:
        if (yield from feed.attempt(_opening(feed, (head,)))):
            feed.put_back(call)
            break
        feed.refuse(call)


def _opening(feed: Feed, openings: tuple[str, ...]) -> Steps[bool]:
    """Any of them, maybe after white space."""
    yield from feed.space()
    for marker in openings:
        if (yield from feed.literal(marker)):
            return True
    return False


def _last(text: str, markers: tuple[str, ...]) -> int:
    return max(text.rfind(marker) for marker in markers)
