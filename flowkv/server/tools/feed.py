"""Text that comes in pieces, read as if all of it were there.

A format is a generator over a `Feed`: it yields where it needs more text, and goes on where it was. So what it finds
cannot depend on where the text was cut. What it shows as a part of a call is out for good; before that it may go back.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from flowkv.server.text.json_text import loads_strict
from flowkv.server.tools.json_scanner import JsonScanner

T = TypeVar("T")
Steps = Generator[None, None, T]

NAME_KEYS = ("name",)
ARGUMENT_KEYS = ("arguments", "parameters")
MAX_GAP = 64  # characters of white space that are dropped before a marker
MAX_WASTED = 64 * 1024  # characters read in vain before all that comes is text
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-:/")


@dataclass(frozen=True, slots=True)
class Text:
    """Of the answer, outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Of the thought before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the last call's arguments: JSON, if the model writes it."""

    text: str


Piece = Text | Reasoning | CallBegin | Arguments


class Feed:
    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._has_ended = False
        self._gap = ""  # white space before the marker found last
        self._furthest = 0  # how far was read for nothing since that marker
        self._num_wasted = 0  # characters read for nothing in all
        self._has_run_out = False  # reading came to the end of all text
        self._is_text = False  # whatever comes
        self._pieces: list[Piece] = []

    # --- from outside --------------------------------------------------------------------------------------------

    def add(self, text: str) -> None:
        self._text += text

    def end(self) -> None:
        """No more text comes: nothing waits for it any more."""
        self._has_ended = True

    def take(self) -> list[Piece]:
        """What was shown since the last time: text that follows text is one piece."""
        pieces, self._pieces = self._pieces, []
        return [piece for kind, run in groupby(pieces, type) for piece in _joined(kind, run)]

    @property
    def unread(self) -> str:
        return self._text[self._at :]

    # --- what a format finds -------------------------------------------------------------------------------------

    def show(self, text: str) -> None:
        if text:
            self._pieces.append(Text(text))

    def begin_call(self, name: str) -> None:
        self._pieces.append(CallBegin(name))

    def show_arguments(self, text: str) -> None:
        if text:
            self._pieces.append(Arguments(text))

    # --- what a format reads -------------------------------------------------------------------------------------

    def text_until(self, *markers: str) -> Steps[str]:
        """Shows the text before the first of `markers` and reads past it, and says which it is; empty: none ever comes.
        White space before it is dropped, up to `MAX_GAP`."""
        while True:
            found, marker = (-1, "") if self._is_text else self._first_of(markers)
            if found >= 0:
                gap_at = self._gap_before(found)
                self.show(self._text[self._at : gap_at])
                self._gap = self._text[gap_at:found]
                self._cut(found + len(marker))
                self._furthest, self._has_run_out = 0, False
                return marker
            keep = len(self._text) if self._has_ended or self._is_text else min(map(self._first_undecided, markers))
            self.show(self._text[self._at : keep])
            self._cut(keep)
            if self._has_ended:
                return ""
            yield

    def put_back(self, marker: str) -> None:
        """What `text_until` has found, and what was read since, is still to be read."""
        self._text, self._at = marker + self._text, 0

    def refuse(self, marker: str) -> None:
        """What `text_until` took for the beginning of a call is text; what was read since is read again.

        Not for ever, as that takes the square of its length: where the text has ended within what may have been a call,
        or too much was read for nothing, the rest is text.
        """
        self._num_wasted += max(self._furthest, self._at)
        self._is_text = self._has_run_out or self._num_wasted > MAX_WASTED
        self._at = 0
        self.show(self._gap + marker)

    def rest(self) -> Steps[None]:
        """All that comes is text."""
        while True:
            self.show(self._text[self._at :])
            self._cut(len(self._text))
            if self._has_ended:
                return
            yield

    def space(self) -> Steps[None]:
        while (yield from self._has_more()) and self._text[self._at].isspace():
            self._at += 1

    def literal(self, word: str) -> Steps[bool]:
        """Reads `word` if it comes next; else nothing."""
        while True:
            ahead = self._text[self._at : self._at + len(word)]
            if ahead == word:
                self._at += len(word)
                return True
            if self._has_ended or not word.startswith(ahead):
                self._has_run_out |= word.startswith(ahead)
                return False
            yield

    def is_next(self, word: str) -> Steps[bool]:
        start = self._at
        found = yield from self.literal(word)
        self._at = start
        return found

    def name(self) -> Steps[str]:
        """The longest run of characters that functions' names are made of; maybe empty."""
        start = self._at
        while (yield from self._has_more()) and self._text[self._at] in _NAME_CHARS:
            self._at += 1
        return self._text[start : self._at]

    def raw_until(self, marker: str) -> Steps[str | None]:
        """The text before `marker`, read past it; None, and nothing is read, where it never comes."""
        begin = self._at
        while (found := self._text.find(marker, begin)) < 0:
            if self._has_ended:
                self._has_run_out = True
                return None
            begin = max(self._at, len(self._text) - len(marker) + 1)
            yield
        raw = self._text[self._at : found]
        self._at = found + len(marker)
        return raw

    def string(self) -> Steps[str | None]:
        """A JSON string; None where none comes next."""
        if not (yield from self._has_more()) or self._text[self._at] != '"':
            return None
        try:
            value = loads_strict((yield from self.value()), strict=False)
        except ValueError:
            return None
        return value if isinstance(value, str) else None

    def value(self) -> Steps[str]:
        """The text of one JSON value, or what there is of it."""
        start, scanner = self._at, JsonScanner()
        while not scanner.is_done and (yield from self._has_more()):
            self._at = scanner.scan(self._text, self._at)
        return self._text[start : self._at]

    def arguments(self) -> Steps[None]:
        """Shows a JSON value as arguments: an object as it comes, anything else once it is whole."""
        if not (yield from self._has_more()):
            return
        if self._text[self._at] != "{":
            self.show_arguments(as_arguments((yield from self.value())))
            return
        scanner = JsonScanner()
        while not scanner.is_done and (yield from self._has_more()):
            start = self._at
            self._at = scanner.scan(self._text, start)
            self.show_arguments(self._text[start : self._at])
            self._cut(self._at)

    def attempt(self, steps: Steps[bool]) -> Steps[bool]:
        """Goes back to where it began if it returns False, as it may only before it has shown anything."""
        start = self._at
        done = yield from steps
        if not done:
            self._furthest = max(self._furthest, self._at)
            self._at = start
        return done

    def call_object(self, is_call: Callable[[str], bool] = bool) -> Steps[bool]:
        """`{"name": ..., "arguments": {...}}`; False, and nothing is read, where it is none."""
        return self.attempt(self._call_object(is_call))

    def call_list(self, is_call: Callable[[str], bool] = bool) -> Steps[bool]:
        """`[{"name": ..., "arguments": {...}}, ...]`; False, and nothing is read, where it is none."""
        return self.attempt(self._call_list(is_call))

    # --- inside --------------------------------------------------------------------------------------------------

    def _call_list(self, is_call: Callable[[str], bool]) -> Steps[bool]:
        if not (yield from self.literal("[")):
            return False
        yield from self.space()
        if not (yield from self.call_object(is_call)):
            return False
        while True:
            yield from self.space()
            if not (yield from self.literal(",")):
                break
            yield from self.space()
            if not (yield from self.call_object(is_call)):
                break
        yield from self.literal("]")
        return True

    def _call_object(self, is_call: Callable[[str], bool]) -> Steps[bool]:
        begun, held, has_arguments = False, "", False
        separator = "{"
        while (yield from self.literal(separator)):
            yield from self.space()
            key = yield from self.string()
            yield from self.space()
            if key is None or not (yield from self.literal(":")):
                return begun
            yield from self.space()
            if key in NAME_KEYS and not begun:
                name = yield from self.string()
                if name is None or not is_call(name):
                    return False
                begun = True
                self.begin_call(name)
                self.show_arguments(held)
            elif key in ARGUMENT_KEYS and begun and not has_arguments:
                has_arguments = True
                yield from self.arguments()
            elif key in ARGUMENT_KEYS and not has_arguments:
                has_arguments = True
                held = as_arguments((yield from self.value()))
            else:
                yield from self.value()
            yield from self.space()
            separator = ","
        if not (yield from self.literal("}")):
            return begun
        if begun and not has_arguments:
            self.show_arguments("{}")
        return begun

    def _has_more(self) -> Steps[bool]:
        while self._at >= len(self._text):
            if self._has_ended:
                self._has_run_out = True
                return False
            yield
        return True

    def _first_of(self, markers: tuple[str, ...]) -> tuple[int, str]:
        """Where it is; -1: nowhere."""
        found = [(self._text.find(marker, self._at), marker) for marker in markers]
        return min((place for place in found if place[0] >= 0), default=(-1, ""))

    def _first_undecided(self, marker: str) -> int:
        """Where the longest end of the text begins that is white space and then a beginning of `marker`."""
        text = self._text
        longest = min(len(marker) - 1, len(text) - self._at)
        length = next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
        return self._gap_before(len(text) - length)

    def _gap_before(self, end: int) -> int:
        """Where the white space before `end` begins that belongs to a marker there."""
        first = max(self._at, end - MAX_GAP)
        return first + len(self._text[first:end].rstrip())

    def _cut(self, at: int) -> None:
        self._text, self._at = self._text[at:], 0


def _joined(kind: type[Piece], run: Iterator[Piece]) -> Iterator[Piece]:
    if kind is Text:
        yield Text("".join(piece.text for piece in run if isinstance(piece, Text)))
    else:
        yield from run


def as_arguments(raw: str) -> str:
    """Some models write the object as a string within the string, or null for an empty one."""
    try:
        value = loads_strict(raw, strict=False)
    except ValueError:
        return raw
    if isinstance(value, str):
        return value
    return "{}" if value is None else raw
