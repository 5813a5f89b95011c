"""What the bodies of the generating routes have in common: fields, their ranges, and how JSON becomes one of them.

Unknown fields are ignored, as OpenAI's own clients rely on; known ones that FlowKV cannot honour are refused.
`None` means left out, for every field. Ranges are part of the types, so that `/openapi.json` shows what is enforced.
"""

import json
import math
import re
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from flowkv.errors import RequestError
from flowkv.server.bodies.structured import Constraint, OutputFormat, StructuredOutputs, constraint_of
from flowkv.server.text.json_text import NestingError, check_nesting
from flowkv.types import DEFERRED

MAX_CHOICES = 2048  # of one body: prompts times n
MAX_STOP_STRINGS = 16
MAX_STOP_IDS = 1024
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_REREAD_BYTES = 64 * 1024  # of a body that is not JSON, to say better what is wrong with it
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
Positive = Annotated[int, Meta(ge=1, le=INT64_MAX)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
TokenKey = Annotated[str, Meta(pattern=r"^[0-9]{1,10}$")]
LogitBias = Annotated[dict[TokenKey, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_BIASES)]
StopString = Annotated[str, Meta(min_length=1)]
StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and plain completions have in common."""

    prompt_field: ClassVar[str]  # which field the prompt comes from
    unsupported: ClassVar[tuple[str, ...]] = ("use_beam_search", "truncate_prompt_tokens", "allowed_token_ids")

    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)] | None = None
    priority: Annotated[int, Meta(ge=-(DEFERRED // 2), le=DEFERRED // 2 - 1)] | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    logit_bias: LogitBias | None = None
    response_format: OutputFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    use_beam_search: Any = None
    truncate_prompt_tokens: Any = None
    allowed_token_ids: Any = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """Of output, at most; None: all that there is room for."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to show beside each output token; None: no log probability at all."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        return None

    @property
    def constraint(self) -> Constraint | None:
        """What the output must be. Raises `RequestError` (400) where that is not one thing."""
        guided = StructuredOutputs(
            json=self.guided_json, regex=self.guided_regex, choice=self.guided_choice, grammar=self.guided_grammar
        )
        return constraint_of(self.response_format, self.structured_outputs, guided)

    def check(self) -> None:
        """What no type can say. Raises `RequestError` (400) naming the field."""
        self._check_supported()
        _ = self.constraint
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", param="stream_options")

    def _check_supported(self) -> None:
        for name in self.unsupported:
            if getattr(self, name):
                raise RequestError(f"{name} is not supported", param=name)


StructT = TypeVar("StructT", bound=msgspec.Struct)
BodyT = TypeVar("BodyT", bound=GenerationBody)

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")


def decode_checked(decoder: "msgspec.json.Decoder[BodyT]", data: bytes) -> BodyT:
    """A body of which every rule holds. Raises `RequestError` (400) naming the field."""
    body = decode(decoder, data)
    body.check()
    return body


def decode(decoder: "msgspec.json.Decoder[StructT]", data: bytes) -> StructT:
    """Raises `RequestError` (400) naming the field."""
    try:
        check_nesting(data)
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from error
    except NestingError as error:
        raise RequestError(f"the body: {error}", code="invalid_json") from error
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
        value = json.loads(data) if len(data) <= MAX_REREAD_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        for name, field in value.items():
            if isinstance(field, float) and not math.isfinite(field):
                return RequestError(f"{name} is a finite number, not {field}", param=name)
    return RequestError(f"the body is not valid JSON: {error}", code="invalid_json")
