"""The answers of `POST /v1/completions`."""

from dataclasses import dataclass

import msgspec

from flowkv.server.answers.envelope import ChunkFormat, Collected, Head, StreamUsage, Usage, encode, event
from flowkv.server.answers.logprobs import CompletionLogprobs, completion_logprobs
from flowkv.server.choice import Delta
from flowkv.server.text.tokenizer import Tokenizer
from flowkv.types import FinishReason, TokenLogprobs


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    echo: str | None = None  # its text, where it is to be shown before each of its choices


class CompletionFormat(ChunkFormat):
    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        head: Head,
        stream_usage: StreamUsage,
        tokenizer: Tokenizer,
        prompts: list[Prompt],
        *,
        n: int,
        logprobs: bool,
        token_ids: bool,
    ) -> None:
        super().__init__(head, stream_usage)
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._n = n
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._offsets: dict[int, int] = {}  # of choices that have begun: characters covered by their tokens

    def events(self, delta: Delta, usage: Usage) -> bytes:
        return event(self._chunk(self._choice(delta.choice, delta, delta.prompt_logprobs), usage))

    def whole(self, usage: Usage) -> bytes:
        shapes = [
            self._choice(number, choice, self._collected[number - number % self._n].prompt_logprobs)
            for number, choice in sorted(self._collected.items())
        ]
        return encode(self._head.envelope(self.kind, shapes, usage))

    def _choice(
        self, number: int, new: Delta | Collected, prompt_logprobs: list[TokenLogprobs] | None
    ) -> CompletionChoice:
        shape = CompletionChoice(number, new.text, None, new.finish_reason, new.stop_reason)
        entries: list[TokenLogprobs | int] = list(new.logprobs)
        if self._token_ids:
            shape.token_ids = new.token_ids
        if number not in self._offsets:
            prompt = self._prompts[number // self._n]
            if self._token_ids:
                shape.prompt_token_ids = prompt.token_ids
            if prompt.echo is not None:
                shape.text = prompt.echo + new.text
                entries = [*prompt.token_ids[:1], *(prompt_logprobs or []), *entries]
        if self._logprobs:
            shape.logprobs = self._shape(number, entries)
        self._offsets.setdefault(number, 0)
        return shape

    def _shape(self, number: int, entries: list[TokenLogprobs | int]) -> CompletionLogprobs:
        shape = completion_logprobs(self._tokenizer, entries, self._offsets.get(number, 0))
        if shape.tokens:
            self._offsets[number] = shape.text_offset[-1] + len(shape.tokens[-1])
        return shape
