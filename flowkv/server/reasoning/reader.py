"""One choice's text, of which the thought comes first and all else is another reader's."""

from flowkv.server.reasoning.thought_format import ThoughtStart, opens, thought
from flowkv.server.tools.feed import Feed, Piece, Reasoning, Steps, Text
from flowkv.server.tools.reader import AnswerReader


class ThoughtReader:
    """White space between a thought and what follows it is dropped."""

    def __init__(self, start: ThoughtStart, rest: AnswerReader, *, is_shown: bool) -> None:
        """Unless `is_shown`, the thought is left out."""
        self._feed = Feed()
        self._steps = _thought_and_space(self._feed, start)
        self._rest = rest
        self._is_shown = is_shown
        self._is_thinking = True

    def push(self, text: str) -> list[Piece]:
        if not self._is_thinking:
            return self._rest.push(text)
        self._feed.add(text)
        return self._run()

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._is_thinking:
            self._feed.end()
            pieces = self._run()
        return pieces + self._rest.finish()

    def _run(self) -> list[Piece]:
        self._is_thinking = next(self._steps, _OVER) is not _OVER
        shown = [piece for piece in self._feed.take() if self._is_shown]
        pieces: list[Piece] = [Reasoning(piece.text) for piece in shown if isinstance(piece, Text)]
        if not self._is_thinking and (text := self._feed.unread):
            pieces += self._rest.push(text)
        return pieces


_OVER = object()


def _thought_and_space(feed: Feed, start: ThoughtStart) -> Steps[None]:
    if (yield from opens(feed, start)):
        yield from thought(feed, start)
        yield from feed.space()
