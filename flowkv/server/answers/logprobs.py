"""Log probabilities in OpenAI's two shapes."""

from codecs import getincrementaldecoder

import msgspec

from flowkv.server.text.tokenizer import Tokenizer
from flowkv.types import TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own value for "never"


class CompletionLogprobs(msgspec.Struct):
    """Four lists of one entry a token; the first token of a prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatTopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


def completion_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprobs | int], offset: int) -> CompletionLogprobs:
    """`entries` holds an id alone for the token that has no probability.

    `offset` is in characters; one that is cut across tokens counts with the last of them.
    """
    shape = CompletionLogprobs([], [], [], [])
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    for entry in entries:
        token_id = entry if isinstance(entry, int) else entry.token_id
        shape.tokens.append(tokenizer.token_text(token_id))
        shape.token_logprobs.append(None if isinstance(entry, int) else finite(entry.logprob))
        shape.top_logprobs.append(None if isinstance(entry, int) else _alternatives(tokenizer, entry))
        shape.text_offset.append(offset)
        offset += len(decoder.decode(tokenizer.token_bytes(token_id)))
    return shape


def chat_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprobs]) -> ChatLogprobs:
    return ChatLogprobs([_chat_entry(tokenizer, entry) for entry in entries])


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _alternatives(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, float]:
    """The token itself is always among them; of tokens that read the same, the likelier counts."""
    words: dict[str, float] = {}
    for token_id, logprob in [*entry.top, (entry.token_id, entry.logprob)]:
        words.setdefault(tokenizer.token_text(token_id), finite(logprob))
    return words


def _chat_entry(tokenizer: Tokenizer, entry: TokenLogprobs) -> ChatTokenLogprob:
    top = [ChatTopLogprob(*_word(tokenizer, token_id, logprob)) for token_id, logprob in entry.top]
    return ChatTokenLogprob(*_word(tokenizer, entry.token_id, entry.logprob), top)


def _word(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    return tokenizer.token_text(token_id), finite(logprob), list(tokenizer.token_bytes(token_id))
