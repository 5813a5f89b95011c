"""How many tokens a thought takes."""

from codecs import getincrementaldecoder
from collections.abc import Callable
from typing import Protocol

from flowkv.server.reasoning.thought_format import ThoughtStart, opens, thought
from flowkv.server.tools.feed import Feed, Steps


class TokenCounter(Protocol):
    def count(self, token_ids: list[int]) -> int:
        """How many more are known to belong to the choice's thought: the next ones after those that were before."""
        ...


NewCounter = Callable[[], TokenCounter]


class NoThought:
    def count(self, token_ids: list[int]) -> int:
        return 0


class ThoughtCounter:
    """Of one choice. It reads the tokens themselves, since their text may be held back.

    Markers are counted, white space after the thought is not. Tokens that may turn out to open none wait.
    """

    def __init__(self, start: ThoughtStart, token_bytes: Callable[[int], bytes]) -> None:
        self._feed = Feed()
        self._steps = self._thought(start)
        self._token_bytes = token_bytes
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._is_thought = start.is_open
        self._is_over = False
        self._num_waiting = 0

    def count(self, token_ids: list[int]) -> int:
        for token_id in token_ids:
            if self._is_over:
                break
            self._num_waiting += 1
            self._read(self._decoder.decode(self._token_bytes(token_id)))
        if not self._is_thought:
            return 0
        number, self._num_waiting = self._num_waiting, 0
        return number

    def _read(self, text: str) -> None:
        self._feed.add(text)
        self._is_over = next(self._steps, _OVER) is _OVER
        self._feed.take()

    def _thought(self, start: ThoughtStart) -> Steps[None]:
        self._is_thought = yield from opens(self._feed, start)
        if self._is_thought:
            yield from thought(self._feed, start)


_OVER = object()
