"""Finds where a JSON value ends, in text that comes in pieces."""

from dataclasses import dataclass

_AFTER_SCALAR = frozenset(",}] \t\r\n")


@dataclass(slots=True)
class JsonScanner:
    """Knows brackets and strings and nothing else: what is within a value is its reader's business."""

    depth: int = 0
    in_string: bool = False
    is_escaped: bool = False
    is_done: bool = False

    def scan(self, text: str, at: int) -> int:
        """Up to where the value ends, or to the end of the text where it goes on; `is_done` says which."""
        while at < len(text) and not self.is_done:
            at = self._in_string(text, at) if self.in_string else self._outside(text, at)
        return at

    def _in_string(self, text: str, at: int) -> int:
        char = text[at]
        if self.is_escaped:
            self.is_escaped = False
        elif char == "\\":
            self.is_escaped = True
        elif char == '"':
            self.in_string = False
            self.is_done = self.depth == 0
        return at + 1

    def _outside(self, text: str, at: int) -> int:
        char = text[at]
        if self.depth == 0 and char in _AFTER_SCALAR:
            self.is_done = True
            return at
        if char == '"':
            self.in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1
            self.is_done = self.depth == 0
        return at + 1
