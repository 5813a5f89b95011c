"""Token ids to text, a token at a time, without ever showing half a character."""

import codecs
from collections.abc import Callable
from typing import Protocol

REPLACEMENT = "\ufffd"  # what a decoder puts in place of bytes that are no whole character yet
MAX_HELD_TOKENS = 32


class Detokenizer(Protocol):
    """The pieces that `push` and the final `flush` return, joined, are the text of all ids."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class ByteDetokenizer:
    """Token ids are bytes of UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes((token_id,)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Decodes a short window of ids, so that a token's text depends on its neighbours as the tokenizer wants.

    The window is the tokens of the last piece that was returned, which give the context (a leading space is dropped
    only at the start of a text), and those held since because they end inside a character. The scheme is that of
    Hugging Face text-generation-inference and vLLM (prefix offset and read offset).
    """

    def __init__(self, decode: Callable[[list[int]], str], skipped_ids: frozenset[int]) -> None:
        """`skipped_ids` never show in the text: a long run of them must not make the window grow."""
        self._decode = decode
        self._skipped_ids = skipped_ids
        self._window: list[int] = []
        self._num_context = 0  # tokens of the window whose text is out
        self._num_shown = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        if token_id in self._skipped_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        # Past the limit it is no character but noise: shown as it is, or each token would cost more than the last.
        if text.endswith(REPLACEMENT) and len(self._window) - self._num_context < MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._decode(self._window)[self._num_shown :]

    def _show(self, text: str) -> str:
        piece = text[self._num_shown :]
        if piece or len(self._window) - self._num_context >= MAX_HELD_TOKENS:
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_shown = len(self._decode(self._window))
        return piece
