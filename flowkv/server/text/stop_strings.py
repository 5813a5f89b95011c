"""Stop strings, found although tokens cut them anywhere."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class StopStrings:
    """Text goes in by pieces and comes out up to the first stop string, which never leaks.

    "First" is the one that is complete first, and of those the longest: what comes out does not depend on where the
    pieces were cut. Held back is only the longest end of the text that could still become a stop string.
    """

    stops: tuple[str, ...]
    include_stop: bool = False
    matched: str | None = None
    _held: str = field(default="")

    def push(self, piece: str) -> str:
        """The text that may be shown now; `matched` is set when the end has come. Raises nothing."""
        if not self.stops:
            return piece
        text = self._held + piece
        found = min(
            ((text.find(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text), default=None
        )
        if found is None:
            keep = len(text) - self._num_undecided(text)
            self._held = text[keep:]
            return text[:keep]
        end, _, self.matched = found
        self._held = ""
        return text[: end if self.include_stop else end - len(self.matched)]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self.stops)) - 1)
        return next((n for n in range(longest, 0, -1) if self._begins_stop(text[-n:])), 0)

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stops)
