"""The body of `POST /v1/chat/completions`."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from flowkv.errors import RequestError
from flowkv.server.bodies.generation import GenerationBody, NumLogprobs, Positive, decode_checked
from flowkv.server.bodies.message import ChatMessage
from flowkv.server.bodies.tools import ToolChoice, Tools, check_tools

TEMPLATE_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of content and of tool calls, in all messages together
Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    prompt_field: ClassVar[str] = "messages"
    unsupported: ClassVar[tuple[str, ...]] = (*GenerationBody.unsupported, "functions", "audio")

    messages: Messages
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    functions: list[Any] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    audio: dict[str, Any] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_variables(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    @property
    def continued(self) -> str:
        """What the assistant is to go on with."""
        return (self.messages[-1].text or "") if self.continue_final_message else ""

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        check_messages(self.messages, self.prompt_field)
        check_tools(self.tools or [], self.tool_choice)
        check_template_use(self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs)


_decoder = msgspec.json.Decoder(ChatBody)


def decode_chat(data: bytes) -> ChatBody:
    """Raises `RequestError` (400) naming the field."""
    return decode_checked(_decoder, data)


def check_messages(messages: list[ChatMessage], field: str) -> None:
    """Raises `RequestError` (400)."""
    num_parts = sum(message.num_parts for message in messages)
    if num_parts > MAX_PARTS:
        reason = f"{field} has {num_parts} parts and tool calls, more than {MAX_PARTS}"
        raise RequestError(reason, param=field, code="too_many_parts")
    for number, message in enumerate(messages):
        message.check(f"{field}[{number}]")


def check_template_use(
    add_generation_prompt: bool | None, continue_final_message: bool | None, variables: dict[str, Any] | None
) -> None:
    """Raises `RequestError` (400)."""
    if continue_final_message and add_generation_prompt is not False:
        reason = "continue_final_message needs add_generation_prompt to be false"
        raise RequestError(reason, param="continue_final_message")
    taken = next((name for name in TEMPLATE_VARIABLES if name in (variables or {})), None)
    if taken is not None:
        raise RequestError(f"chat_template_kwargs may not set {taken}", param="chat_template_kwargs")
