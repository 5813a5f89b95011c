"""The answers of OpenAI's API: chunks of a stream (server-sent events), and whole ones."""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from flowkv.errors import RequestError
from flowkv.server.choice import Delta
from flowkv.server.logprobs import ChatLogprobs, CompletionLogprobs, chat_logprobs, completion_logprobs
from flowkv.server.tokenizer import Tokenizer
from flowkv.types import FinishReason, TokenLogprobs

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int = 0


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


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


class Envelope(msgspec.Struct):
    """`usage` is left out of a stream's chunks unless the client asked for it, and then null but in the last."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


@dataclass(slots=True)
class Collected:
    """All of one choice."""

    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of one answer repeats."""

    response_id: str
    created: int
    model: str

    def event(self, kind: str, choices: list[Any], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return b"data: " + self.body(kind, choices, usage) + b"\n\n"

    def body(self, kind: str, choices: list[Any], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return _encoder.encode(Envelope(self.response_id, kind, self.created, self.model, choices, usage))


class ResponseFormat(Protocol):
    def events(self, delta: Delta) -> bytes:
        """The chunks that show one delta."""
        ...

    def usage_event(self, usage: Usage) -> bytes: ...

    def whole(self, choices: list[Collected], usage: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is to be shown before each of its choices."""

    text: str
    prompt_ids: list[int]


class CompletionFormat:
    kind = "text_completion"

    def __init__(
        self, head: Head, tokenizer: Tokenizer, *, n: int, logprobs: bool, echoes: list[Echo], with_usage: bool
    ) -> None:
        """`echoes`: one a prompt, or none at all."""
        self._head = head
        self._tokenizer = tokenizer
        self._n = n
        self._logprobs = logprobs
        self._echoes = echoes
        self._usage = None if with_usage else msgspec.UNSET
        self._offsets: dict[int, int] = {}  # of choices that have begun: characters covered by their tokens

    def events(self, delta: Delta) -> bytes:
        choice = self._choice(
            delta.choice, delta.text, delta.logprobs, delta.prompt_logprobs, delta.finish_reason, delta.stop_reason
        )
        return self._head.event(self.kind, [choice], self._usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._head.event(self.kind, [], usage)

    def whole(self, choices: list[Collected], usage: Usage) -> bytes:
        shapes = [
            self._choice(
                number,
                choice.text,
                choice.logprobs,
                choices[number - number % self._n].prompt_logprobs,
                choice.finish_reason,
                choice.stop_reason,
            )
            for number, choice in enumerate(choices)
        ]
        return self._head.body(self.kind, shapes, usage)

    def _choice(
        self,
        number: int,
        text: str,
        logprobs: list[TokenLogprobs],
        prompt_logprobs: list[TokenLogprobs] | None,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> CompletionChoice:
        entries: list[TokenLogprobs | int] = list(logprobs)
        if self._echoes and number not in self._offsets:
            echo = self._echoes[number // self._n]
            text = echo.text + text
            entries = [*echo.prompt_ids[:1], *(prompt_logprobs or []), *entries]
        shape = self._shape(number, entries) if self._logprobs else None
        self._offsets.setdefault(number, 0)
        return CompletionChoice(number, text, shape, finish_reason, stop_reason)

    def _shape(self, number: int, entries: list[TokenLogprobs | int]) -> CompletionLogprobs:
        shape = completion_logprobs(self._tokenizer, entries, self._offsets.get(number, 0))
        if shape.tokens:
            self._offsets[number] = shape.text_offset[-1] + len(shape.tokens[-1])
        return shape


class ChatFormat:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, with_usage: bool) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = None if with_usage else msgspec.UNSET
        self._begun: set[int] = set()

    def events(self, delta: Delta) -> bytes:
        choice = ChatChunkChoice(
            delta.choice,
            ChatDelta(content=delta.text),
            self._shape(delta.logprobs),
            delta.finish_reason,
            delta.stop_reason,
        )
        event = self._head.event(self.chunk_kind, [choice], self._usage)
        if delta.choice in self._begun:
            return event
        self._begun.add(delta.choice)
        opening = ChatChunkChoice(delta.choice, ChatDelta("assistant", ""))
        return self._head.event(self.chunk_kind, [opening], self._usage) + event

    def usage_event(self, usage: Usage) -> bytes:
        return self._head.event(self.chunk_kind, [], usage)

    def whole(self, choices: list[Collected], usage: Usage) -> bytes:
        shapes = [
            ChatChoice(
                number, ChatAnswer(choice.text), self._shape(choice.logprobs), choice.finish_reason, choice.stop_reason
            )
            for number, choice in enumerate(choices)
        ]
        return self._head.body(self.kind, shapes, usage)

    def _shape(self, logprobs: list[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, logprobs) if self._logprobs else None


def error_body(error: RequestError) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`"""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    fields = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return _encoder.encode({"error": fields})


def error_event(error: RequestError) -> bytes:
    return b"data: " + error_body(error) + b"\n\n"
