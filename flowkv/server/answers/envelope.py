"""What OpenAI's answers have in common, whole ones and streams of server-sent events: envelopes and usage."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from flowkv.errors import RequestError
from flowkv.server.bodies.generation import StreamOptions
from flowkv.server.choice import Delta
from flowkv.server.error_answer import error_fields
from flowkv.types import FinishReason, TokenLogprobs

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()

ChoiceT = TypeVar("ChoiceT")


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0  # stays 0: no KV outlives its request, so each prompt is computed anew


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """`completion_tokens_details` where thoughts are told apart."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET

    @property
    def reasoning_tokens(self) -> int:
        details = self.completion_tokens_details
        return 0 if details is msgspec.UNSET else details.reasoning_tokens


class Envelope(msgspec.Struct, Generic[ChoiceT]):
    """`usage` is left out of a stream's chunks unless the client asked for it, and then null in all but the last."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceT]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


@dataclass(slots=True)
class Collected:
    """All of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(frozen=True, slots=True)
class StreamUsage:
    """Where a stream shows its usage."""

    in_last: bool = False  # a chunk of its own
    in_all: bool = False  # and what there is so far in every chunk

    @classmethod
    def of(cls, options: StreamOptions | None) -> "StreamUsage":
        if options is None or not options.include_usage:
            return cls()
        return cls(True, bool(options.continuous_usage_stats))

    def of_chunk(self, usage: Usage) -> Usage | msgspec.UnsetType | None:
        if self.in_all:
            return usage
        return None if self.in_last else msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of one answer repeats."""

    response_id: str
    created: int
    model: str

    def envelope(self, kind: str, choices: list[ChoiceT], usage: Usage | msgspec.UnsetType | None) -> Envelope[ChoiceT]:
        return Envelope(self.response_id, kind, self.created, self.model, choices, usage)


class ResponseFormat(Protocol):
    """`usage` is always that of all tokens so far."""

    def events(self, delta: Delta, usage: Usage) -> bytes:
        """The chunks that show one delta."""
        ...

    def failure(self, error: RequestError) -> bytes:
        """A stream has begun and cannot go on."""
        ...

    def ending(self, usage: Usage) -> bytes:
        """The last of a stream."""
        ...

    def collect(self, delta: Delta) -> None:
        """One more of an answer that goes out whole."""
        ...

    def whole(self, usage: Usage) -> bytes:
        """What was collected, which is all of it."""
        ...


class ChunkFormat:
    """What the streams of both completions routes have in common."""

    chunk_kind = ""

    def __init__(self, head: Head, stream_usage: StreamUsage) -> None:
        self._head = head
        self._stream_usage = stream_usage
        self._collected: defaultdict[int, Collected] = defaultdict(Collected)

    def collect(self, delta: Delta) -> None:
        self._collected[delta.choice].add(delta)

    def failure(self, error: RequestError) -> bytes:
        return event(error_fields(error))

    def ending(self, usage: Usage) -> bytes:
        if not self._stream_usage.in_last:
            return DONE
        return event(self._head.envelope(self.chunk_kind, [], usage)) + DONE

    def _chunk(self, choice: ChoiceT, usage: Usage) -> Envelope[ChoiceT]:
        return self._head.envelope(self.chunk_kind, [choice], self._stream_usage.of_chunk(usage))


def event(value: Any) -> bytes:
    return b"data: " + _encoder.encode(value) + b"\n\n"


def encode(value: Any) -> bytes:
    return _encoder.encode(value)
