"""The messages of a conversation, as OpenAI's clients send them and as chat templates take them."""

import json
from typing import Any, Literal

import msgspec

from flowkv.errors import RequestError

TEXT_TYPES = ("text", "input_text", "output_text")  # the latter two are those of /v1/responses


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    function_call: Any = None

    @property
    def text(self) -> str | None:
        """Text parts are joined by newlines; None: there is no content at all."""
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "\n".join(part.text or "" for part in self.content)

    def plain(self) -> dict[str, Any]:
        """As `transformers` hands it to templates: arguments as objects, what was left out left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            message |= {"reasoning_content": self.reasoning_content, "thinking": self.reasoning_content}
        return message

    def check(self, where: str) -> None:
        """`where` is its place in the body, as `messages[0]`. Raises `RequestError` (400)."""
        field = where.partition("[")[0]
        if self.function_call is not None:
            raise RequestError(f"{where}: function_call is not supported, use tool_calls", param=field)
        if self.tool_calls and self.role != "assistant":
            raise RequestError(f"{where}: only an assistant has tool_calls", param=field)
        if self.content is None and not self.tool_calls:
            raise RequestError(f"{where}.content is missing", param=field)
        if isinstance(self.content, list):
            _check_parts(where, self.content)
        for number, call in enumerate(self.tool_calls or []):
            if _arguments(call) is None:
                reason = f"{where}.tool_calls[{number}].function.arguments is not a JSON object"
                raise RequestError(reason, param=field)


def _plain_call(call: ToolCall) -> dict[str, Any]:
    plain = {"type": call.type, "function": {"name": call.function.name, "arguments": _arguments(call)}}
    return plain if call.id is None else {"id": call.id, **plain}


def _arguments(call: ToolCall) -> dict[str, Any] | None:
    """None where they are no object."""
    if isinstance(call.function.arguments, dict):
        return call.function.arguments
    try:
        value = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _check_parts(where: str, parts: list[ContentPart]) -> None:
    field = where.partition("[")[0]
    for number, part in enumerate(parts):
        if part.type not in TEXT_TYPES:
            raise RequestError(f"{where}.content[{number}] of type {part.type!r}: only text is supported", param=field)
        if part.text is None:
            raise RequestError(f"{where}.content[{number}].text is missing", param=field)
