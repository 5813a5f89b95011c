"""The answers of `POST /v1/responses`."""

from typing import Any, Literal

import msgspec

from flowkv.errors import RequestError
from flowkv.server.answers.envelope import Head, PromptTokensDetails, Usage, encode
from flowkv.server.answers.items import Event, OutputItem, ResponseItems
from flowkv.server.answers.logprobs import ChatTokenLogprob, chat_logprobs
from flowkv.server.bodies.responses import FunctionTool, NamedFunction, ResponsesBody, TextFormat, TextOptions
from flowkv.server.choice import Delta
from flowkv.server.text.tokenizer import Tokenizer
from flowkv.server.tools.answer import Answer
from flowkv.server.tools.plan import ToolPlan
from flowkv.types import FinishReason, TokenLogprobs


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponsesUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()


class Incomplete(msgspec.Struct):
    reason: Literal["max_output_tokens"]


class Failure(msgspec.Struct):
    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """What `/v1/responses` answers, and what the first and the last events of a stream hold."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    object: Literal["response"] = "response"
    output: list[OutputItem] = []
    usage: ResponsesUsage | None = None
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: bool = False
    background: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    text: TextOptions = TextOptions(TextFormat(type="text"))
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    tools: list[FunctionTool] = []
    truncation: Literal["disabled"] = "disabled"


class ResponsesFormat:
    def __init__(self, head: Head, body: ResponsesBody, tokenizer: Tokenizer, plan: ToolPlan) -> None:
        self._tokenizer = tokenizer
        self._answer = Answer(plan)
        self._items = ResponseItems(plan.id_length)
        self._response = _beginning(head, body)
        self._num_events = 0

    def events(self, delta: Delta, usage: Usage) -> bytes:
        opening = b"" if self._num_events else self._encode(self._opening())
        return opening + self._encode(self._take(delta))

    def failure(self, error: RequestError) -> bytes:
        self._response.status = "failed"
        self._response.error = Failure(error.code or "server_error", error.message)
        return b""

    def ending(self, usage: Usage) -> bytes:
        self._finish(usage)
        return self._encode([(f"response.{self._response.status}", {"response": self._response})])

    def collect(self, delta: Delta) -> None:
        self._take(delta)

    def whole(self, usage: Usage) -> bytes:
        self._finish(usage)
        return encode(self._response)

    def _take(self, new: Delta) -> list[Event]:
        finish_reason = new.finish_reason
        pieces = self._answer.read(new.text, finish_reason)
        events = self._items.take(pieces, self._shape(new.logprobs), new.num_thought_tokens)
        if finish_reason is None:
            return events
        if finish_reason is FinishReason.ABORT:
            self.failure(RequestError("the server is stopping", code="aborted"))
        is_whole = finish_reason is FinishReason.STOP
        if finish_reason is FinishReason.LENGTH:
            self._response.incomplete_details = Incomplete("max_output_tokens")
        return events + self._items.close("completed" if is_whole else "incomplete")

    def _finish(self, usage: Usage) -> None:
        if self._response.status == "in_progress":
            self._response.status = "incomplete" if self._response.incomplete_details else "completed"
        if self._items.items:  # what a failure has left open
            self._items.close("incomplete")
        self._response.output = self._items.items
        self._response.usage = ResponsesUsage(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            usage.prompt_tokens_details,
            OutputTokensDetails(usage.reasoning_tokens),
        )

    def _opening(self) -> list[Event]:
        return [(f"response.{kind}", {"response": self._response}) for kind in ("created", "in_progress")]

    def _encode(self, events: list[Event]) -> bytes:
        return b"".join(self._encode_one(kind, fields) for kind, fields in events)

    def _encode_one(self, kind: str, fields: dict[str, Any]) -> bytes:
        data = encode({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _shape(self, logprobs: list[TokenLogprobs]) -> list[ChatTokenLogprob]:
        return chat_logprobs(self._tokenizer, logprobs).content


def _beginning(head: Head, body: ResponsesBody) -> ResponseObject:
    """What was asked for, with the defaults that were taken."""
    response = ResponseObject(
        id=head.response_id,
        created_at=head.created,
        model=head.model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
    )
    for name in ("metadata", "parallel_tool_calls", "temperature", "top_p", "text", "tool_choice", "tools"):
        value = getattr(body, name)
        if value is not None:
            setattr(response, name, value)
    return response
