"""The answers of `POST /v1/chat/completions`."""

from typing import Literal

import msgspec

from flowkv.server.answers.envelope import ChunkFormat, Collected, Head, StreamUsage, Usage, encode, event
from flowkv.server.answers.logprobs import ChatLogprobs, chat_logprobs
from flowkv.server.choice import Delta
from flowkv.server.text.tokenizer import Tokenizer
from flowkv.server.tools.answer import Answer, AnswerPart
from flowkv.server.tools.plan import ToolPlan
from flowkv.types import TokenLogprobs


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """The first of a call has its id, type and name; `arguments` of all of them joined are the call's."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, by vLLM's name
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class FunctionAnswer(msgspec.Struct):
    name: str
    arguments: str


class ToolCallAnswer(msgspec.Struct):
    id: str
    function: FunctionAnswer
    type: Literal["function"] = "function"


class ChatAnswer(msgspec.Struct):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType | None = msgspec.UNSET  # where thoughts are told apart
    reasoning: str | msgspec.UnsetType | None = msgspec.UNSET  # the same, by vLLM's name
    tool_calls: list[ToolCallAnswer] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
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
        plan: ToolPlan,
        *,
        logprobs: bool,
        token_ids: bool,
        reasoning: bool,
    ) -> None:
        super().__init__(head, stream_usage)
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._plan = plan
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._reasoning = reasoning
        self._answers: dict[int, Answer] = {}  # of the choices that have begun

    def events(self, delta: Delta, usage: Usage) -> bytes:
        opening = b"" if delta.choice in self._answers else self._opening(delta.choice, usage)
        answer = self._answers[delta.choice]
        part = answer.add(delta.text, delta.finish_reason)
        if part.is_empty and not (delta.finish_reason or self._token_ids or self._logprobs):
            return opening
        choice = ChatChunkChoice(
            delta.choice,
            _delta(part),
            self._shape(delta.logprobs),
            answer.finish_reason,
            delta.stop_reason,
            self._ids(delta.token_ids),
        )
        return opening + event(self._chunk(choice, usage))

    def whole(self, usage: Usage) -> bytes:
        shapes = [self._choice(number, choice) for number, choice in sorted(self._collected.items())]
        envelope = self._head.envelope(self.kind, shapes, usage)
        envelope.prompt_token_ids = self._ids(self._prompt_ids)
        return encode(envelope)

    def _choice(self, number: int, choice: Collected) -> ChatChoice:
        answer = Answer(self._plan)
        part = answer.add(choice.text, choice.finish_reason)
        return ChatChoice(
            number,
            self._message(part),
            self._shape(choice.logprobs),
            answer.finish_reason,
            choice.stop_reason,
            self._ids(choice.token_ids),
        )

    def _message(self, part: AnswerPart) -> ChatAnswer:
        """All of an answer is one part, in which every call begins."""
        message = ChatAnswer(part.text)
        if self._reasoning:
            message.content = part.text or None
            message.reasoning_content = message.reasoning = part.reasoning or None
        if part.calls:
            message.content = part.text or None
            message.tool_calls = [
                ToolCallAnswer(call.call_id or "", FunctionAnswer(call.name or "", call.arguments))
                for call in part.calls
            ]
        return message

    def _opening(self, number: int, usage: Usage) -> bytes:
        """A choice begins with a chunk that has the role and no text; the first of them has the prompt's ids."""
        chunk = self._chunk(ChatChunkChoice(number, ChatDelta("assistant", "")), usage)
        if not self._answers:
            chunk.prompt_token_ids = self._ids(self._prompt_ids)
        self._answers[number] = Answer(self._plan)
        return event(chunk)

    def _shape(self, logprobs: list[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, logprobs) if self._logprobs else None

    def _ids(self, token_ids: list[int]) -> list[int] | msgspec.UnsetType:
        return token_ids if self._token_ids else msgspec.UNSET


def _delta(part: AnswerPart) -> ChatDelta:
    calls = [
        ToolCallDelta(call.index, FunctionDelta(call.arguments, call.name), call.call_id, call.call_id and "function")
        for call in part.calls
    ]
    reasoning = part.reasoning or None
    return ChatDelta(
        content=part.text if part.text or not (reasoning or calls) else None,
        reasoning_content=reasoning,
        reasoning=reasoning,
        tool_calls=calls or None,
    )
