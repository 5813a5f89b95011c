"""The bodies of OpenAI's API that clients send: their fields, and every rule that needs nothing but the body.

Unknown fields are ignored, as OpenAI's own clients rely on; known ones that FlowKV cannot honour are refused.
`None` means left out, for every field.
"""

import json
import math
import re
from typing import Any, TypeVar

import msgspec

from flowkv.errors import RequestError
from flowkv.types import DEFERRED

MAX_CHOICES = 2048  # of one body: prompts times n
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
ROLES = ("system", "developer", "user", "assistant")
MIN_PRIORITY, MAX_PRIORITY = -(DEFERRED // 2), DEFERRED // 2 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it; text parts are joined by newlines."""
        parts = [self.content] if isinstance(self.content, str) else [part.text or "" for part in self.content or []]
        return {"role": self.role, "content": "\n".join(parts)}


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    priority: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or more, each text or token ids. Raises `RequestError` where it is neither, or empty."""
        parts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        ids = [part for part in parts if isinstance(part, int)]
        prompts: list[str | list[int]] = [part for part in parts if not isinstance(part, int)]
        if ids and prompts:
            raise RequestError("prompt mixes token ids with whole prompts", param="prompt")
        if ids:
            return [ids]
        if not prompts or any(not prompt for prompt in prompts):
            raise RequestError("prompt is empty: it needs at least one token", param="prompt", code="empty_prompt")
        return prompts


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None


BodyT = TypeVar("BodyT", CompletionBody, ChatBody)

_completion_decoder = msgspec.json.Decoder(CompletionBody)
_chat_decoder = msgspec.json.Decoder(ChatBody)
_PATH = re.compile(r" - at `\$\.?(.*)`$")


def decode_completion(data: bytes) -> CompletionBody:
    """Raises `RequestError` (400) naming the field."""
    body = _decode(_completion_decoder, data)
    _check_common(body)
    _check_range("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    if body.best_of is not None and body.best_of != body.num_choices:
        raise RequestError("best_of other than n is not supported", param="best_of")
    _refuse_set(body, "suffix")
    _check_range("max_tokens", body.max_tokens, 0 if body.echo else 1, INT64_MAX)
    if body.echo and body.stream and body.logprobs is not None and body.num_choices > 1:
        raise RequestError("echo with logprobs can only be streamed for n of 1", param="echo")
    return body


def decode_chat(data: bytes) -> ChatBody:
    """Raises `RequestError` (400) naming the field."""
    body = _decode(_chat_decoder, data)
    _check_common(body)
    _check_range("max_tokens", body.max_tokens, 1, INT64_MAX)
    _check_range("max_completion_tokens", body.max_completion_tokens, 1, INT64_MAX)
    _check_range("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    _refuse_set(body, "tools", "functions", "audio")
    _refuse_other(body, "tool_choice", ("none", "auto"))
    _refuse_other(body, "function_call", ("none", "auto"))
    _refuse_other(body, "modalities", (["text"],))
    _check_messages(body.messages)
    return body


def _decode(decoder: "msgspec.json.Decoder[BodyT]", data: bytes) -> BodyT:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _syntax_error(data, error) from error


def _field_error(text: str) -> RequestError:
    """From msgspec's words ("Expected `int`, got `str` - at `$.max_tokens`") to ours, with the field first."""
    match = _PATH.search(text)
    reason = _PATH.sub("", text).replace("`", "")
    if match is None:
        missing = re.fullmatch(r"Object missing required field (\w+)", reason)
        return RequestError(f"the body: {reason}", param=missing[1] if missing else None)
    path = match[1]
    return RequestError(f"{path}: {reason}", param=re.split(r"[.\[]", path)[0] or None)


def _syntax_error(data: bytes, error: Exception) -> RequestError:
    """Python's own encoder writes NaN and Infinity, which JSON does not have: those deserve their field's name."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        for name, field in value.items():
            if isinstance(field, float) and not math.isfinite(field):
                return RequestError(f"{name} is a finite number, not {field}", param=name)
    return RequestError(f"the body is not valid JSON: {error}", code="invalid_json")


def _check_common(body: GenerationBody) -> None:
    _check_range("n", body.n, 1, MAX_CHOICES)
    _check_range("min_tokens", body.min_tokens, 0, INT64_MAX)
    _check_range("temperature", body.temperature, 0.0, 2.0)
    _check_range("top_p", body.top_p, 0.0, 1.0, above=True)
    _check_range("top_k", body.top_k, -1, INT64_MAX)
    _check_range("min_p", body.min_p, 0.0, 1.0)
    _check_range("seed", body.seed, INT64_MIN, INT64_MAX)
    _check_range("priority", body.priority, MIN_PRIORITY, MAX_PRIORITY)
    _check_range("repetition_penalty", body.repetition_penalty, 0.01, 10.0)
    _check_range("presence_penalty", body.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", body.frequency_penalty, -2.0, 2.0)
    _check_stop(body)
    _refuse_set(body, "logit_bias")
    if body.response_format and body.response_format.get("type") != "text":
        raise RequestError("response_format other than text is not supported", param="response_format")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")


def _check_stop(body: GenerationBody) -> None:
    if len(body.stop_strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has more than {MAX_STOP_STRINGS} strings", param="stop")
    if "" in body.stop_strings:
        raise RequestError("stop holds an empty string, which would end every answer at once", param="stop")


def _check_range(name: str, value: float | None, low: float, high: float, *, above: bool = False) -> None:
    """Within [low, high], or (low, high] where `above`."""
    if value is None or (low <= value <= high and not (above and value == low)):
        return
    if high == INT64_MAX:
        raise RequestError(f"{name} is at least {low}, not {value}", param=name)
    kind = "above" if above else "from"
    raise RequestError(f"{name} is {kind} {low} to {high}, not {value}", param=name)


def _refuse_set(body: GenerationBody, *names: str) -> None:
    for name in names:
        if getattr(body, name):
            raise RequestError(f"{name} is not supported", param=name)


def _refuse_other(body: GenerationBody, name: str, allowed: tuple[Any, ...]) -> None:
    value = getattr(body, name)
    if value is not None and value not in allowed:
        raise RequestError(f"{name} of {value!r} is not supported", param=name)


def _check_messages(messages: list[ChatMessage]) -> None:
    if not messages:
        raise RequestError("messages is empty", param="messages", code="empty_prompt")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.role not in ROLES:
            raise RequestError(f"{where}.role is one of {', '.join(ROLES)}, not {message.role!r}", param="messages")
        if message.tool_calls or message.function_call:
            raise RequestError(f"{where}: tool calls are not supported", param="messages")
        if message.content is None:
            raise RequestError(f"{where}.content is missing", param="messages")
        if not isinstance(message.content, str):
            _check_parts(where, message.content)


def _check_parts(where: str, parts: list[ContentPart]) -> None:
    for number, part in enumerate(parts):
        if part.type != "text":
            raise RequestError(
                f"{where}.content[{number}] of type {part.type!r}: only text is supported", param="messages"
            )
        if part.text is None:
            raise RequestError(f"{where}.content[{number}].text is missing", param="messages")
