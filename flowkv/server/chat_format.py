"""The answers of `POST /v1/chat/completions`."""

from typing import Literal

import msgspec

from flowkv.server.choice import Delta
from flowkv.server.logprobs import ChatLogprobs, chat_logprobs
from flowkv.server.response import ChunkFormat, Collected, Head, StreamUsage, Usage, encode, event
from flowkv.server.tokenizer import Tokenizer
from flowkv.types import FinishReason, TokenLogprobs


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatAnswer(msgspec.Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatFormat(ChunkFormat):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self,
        head: Head,
        stream_usage: StreamUsage,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        *,
        logprobs: bool,
        token_ids: bool,
    ) -> None:
        super().__init__(head, stream_usage)
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._begun: set[int] = set()

    def events(self, delta: Delta, usage: Usage) -> bytes:
        choice = ChatChunkChoice(
            delta.choice,
            ChatDelta(content=delta.text),
            self._shape(delta.logprobs),
            delta.finish_reason,
            delta.stop_reason,
            self._ids(delta.token_ids),
        )
        return self._opening(delta.choice, usage) + event(self._chunk(choice, usage))

    def whole(self, choices: list[Collected], usage: Usage) -> bytes:
        shapes = [
            ChatChoice(
                number,
                ChatAnswer(choice.text),
                self._shape(choice.logprobs),
                choice.finish_reason,
                choice.stop_reason,
                self._ids(choice.token_ids),
            )
            for number, choice in enumerate(choices)
        ]
        envelope = self._head.envelope(self.kind, shapes, usage)
        envelope.prompt_token_ids = self._ids(self._prompt_ids)
        return encode(envelope)

    def _opening(self, number: int, usage: Usage) -> bytes:
        """A choice begins with a chunk that has the role and no text; the first of them has the prompt's ids."""
        if number in self._begun:
            return b""
        chunk = self._chunk(ChatChunkChoice(number, ChatDelta("assistant", "")), usage)
        if not self._begun:
            chunk.prompt_token_ids = self._ids(self._prompt_ids)
        self._begun.add(number)
        return event(chunk)

    def _shape(self, logprobs: list[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, logprobs) if self._logprobs else None

    def _ids(self, token_ids: list[int]) -> list[int] | msgspec.UnsetType:
        return token_ids if self._token_ids else msgspec.UNSET
