"""The body of `POST /v1/chat/completions`."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from flowkv.errors import RequestError
from flowkv.server.protocol import GenerationBody, NumLogprobs, Positive, decode_checked


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it; text parts are joined by newlines."""
        parts = [self.content] if isinstance(self.content, str) else [part.text or "" for part in self.content or []]
        return {"role": self.role, "content": "\n".join(parts)}

    def check(self, where: str) -> None:
        """Raises `RequestError` (400)."""
        if self.tool_calls or self.function_call:
            raise RequestError(f"{where}: tool calls are not supported", param="messages")
        if self.content is None:
            raise RequestError(f"{where}.content is missing", param="messages")
        if not isinstance(self.content, str):
            _check_parts(where, self.content)


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    prompt_field: ClassVar[str] = "messages"
    unsupported: ClassVar[tuple[str, ...]] = (*GenerationBody.unsupported, "tools", "functions", "audio")

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        self._refuse_other("tool_choice", ("none", "auto"))
        self._refuse_other("function_call", ("none", "auto"))
        self._refuse_other("modalities", (["text"],))
        for number, message in enumerate(self.messages):
            message.check(f"messages[{number}]")

    def _refuse_other(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value is not None and value not in allowed:
            raise RequestError(f"{name} of {value!r} is not supported", param=name)


_decoder = msgspec.json.Decoder(ChatBody)


def decode_chat(data: bytes) -> ChatBody:
    """Raises `RequestError` (400) naming the field."""
    return decode_checked(_decoder, data)


def _check_parts(where: str, parts: list[ContentPart]) -> None:
    for number, part in enumerate(parts):
        if part.type != "text":
            raise RequestError(
                f"{where}.content[{number}] of type {part.type!r}: only text is supported", param="messages"
            )
        if part.text is None:
            raise RequestError(f"{where}.content[{number}].text is missing", param="messages")
