"""One choice's text, read for tool calls while it comes."""

import random
import string
from collections.abc import Callable
from typing import Protocol

from flowkv.server.tools.feed import Arguments, CallBegin, Feed, Piece, Text
from flowkv.server.tools.tool_format import ToolFormat, ToolSchemas

_ID_CHARS = string.ascii_letters + string.digits


class AnswerReader(Protocol):
    """What a choice's text says. Joined, the pieces do not depend on where the text was cut."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """What was held back, when no more text comes."""
        ...


NewReader = Callable[[], AnswerReader]


class PlainReader:
    """Text is text."""

    def push(self, text: str) -> list[Piece]:
        return [Text(text)]

    def finish(self) -> list[Piece]:
        return []


class ToolReader:
    def __init__(self, tool_format: ToolFormat, tools: ToolSchemas, *, parallel: bool) -> None:
        """Unless `parallel`, calls after the first are left out."""
        self._feed = Feed()
        self._steps = tool_format.parse(self._feed, tools)
        self._max_calls = None if parallel else 1
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._feed.add(text)
        return self._run()

    def finish(self) -> list[Piece]:
        self._feed.end()
        return self._run()

    def _run(self) -> list[Piece]:
        next(self._steps, None)
        return [piece for piece in self._feed.take() if self._is_wanted(piece)]

    def _is_wanted(self, piece: Piece) -> bool:
        self._num_calls += isinstance(piece, CallBegin)
        return isinstance(piece, Text) or self._max_calls is None or self._num_calls <= self._max_calls


class NamedReader:
    """All text is the arguments of one function, as a grammar makes a model write them."""

    def __init__(self, name: str) -> None:
        self._opening: list[Piece] = [CallBegin(name)]

    def push(self, text: str) -> list[Piece]:
        opening, self._opening = self._opening, []
        return [*opening, Arguments(text)]

    def finish(self) -> list[Piece]:
        return []


def call_id(length: int) -> str:
    """Mistral's templates take ids of nine letters and digits only; of others the beginning says what it is."""
    chars = "".join(random.choices(_ID_CHARS, k=length))
    return chars if length == 9 else f"call_{chars}"
