"""The messages of a conversation, as OpenAI's clients send them and as chat templates take them."""

from typing import Any, Literal

import msgspec

from flowkv.errors import RequestError
from flowkv.server.text.json_text import loads_strict

TEXT_TYPES = ("text", "input_text", "output_text")  # the latter two are those of /v1/responses
REFUSAL = "refusal"  # a part of an assistant's earlier answer, in place of text


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None

    @property
    def shown(self) -> str | None:
        return self.refusal if self.type == REFUSAL else self.text


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
    reasoning: str | None = None  # the same, by vLLM's name
    function_call: Any = None

    @property
    def text(self) -> str | None:
        """Text parts are joined by newlines; None: there is no content at all."""
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "\n".join(part.shown or "" for part in self.content)

    @property
    def thought(self) -> str | None:
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    @property
    def is_thought(self) -> bool:
        """And nothing else."""
        return self._is_empty and self.thought is not None

    @property
    def num_parts(self) -> int:
        """Of its content, and tool calls."""
        return (len(self.content) if isinstance(self.content, list) else 0) + len(self.tool_calls or ())

    @property
    def _is_empty(self) -> bool:
        return self.content is None and not self.tool_calls

    def plain(self) -> dict[str, Any]:
        """As `transformers` hands it to templates: arguments as objects, what was left out left out."""
        message: dict[str, Any] = {"role": self.role, "content": "" if self._is_empty else self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if (thought := self.thought) is not None:
            message |= {"reasoning_content": thought, "thinking": thought}
        return message

    def check(self, where: str) -> None:
        """`where` is its place in the body, as `messages[0]`. Raises `RequestError` (400)."""
        field = where.partition("[")[0]
        if self.function_call is not None:
            raise RequestError(f"{where}: function_call is not supported, use tool_calls", param=field)
        if self.tool_calls and self.role != "assistant":
            raise RequestError(f"{where}: only an assistant has tool_calls", param=field)
        if self._is_empty and self.role != "assistant":  # whose answer may have been cut before its first word
            raise RequestError(f"{where}.content is missing", param=field)
        if isinstance(self.content, list):
            _check_parts(where, self.content)


def _plain_call(call: ToolCall) -> dict[str, Any]:
    plain = {"type": call.type, "function": {"name": call.function.name, "arguments": _arguments(call)}}
    return plain if call.id is None else {"id": call.id, **plain}


def _arguments(call: ToolCall) -> dict[str, Any] | str:
    """As they are where they are no object: a model may have written them so, or been cut short."""
    arguments = call.function.arguments
    if isinstance(arguments, dict):
        return arguments
    try:
        value = loads_strict(arguments or "{}")
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _check_parts(where: str, parts: list[ContentPart]) -> None:
    field = where.partition("[")[0]
    for number, part in enumerate(parts):
        if part.type not in (*TEXT_TYPES, REFUSAL):
            raise RequestError(f"{where}.content[{number}] of type {part.type!r}: only text is supported", param=field)
        if part.shown is None:
            name = "refusal" if part.type == REFUSAL else "text"
            raise RequestError(f"{where}.content[{number}].{name} is missing", param=field)
