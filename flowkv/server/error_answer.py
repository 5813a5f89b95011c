"""Every error in OpenAI's shape, whoever answers with it: a route, the gate, or a connection that is cut off."""

import math
from typing import Literal

import msgspec

from flowkv.errors import RequestError

ErrorKind = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ErrorFields(msgspec.Struct):
    message: str
    type: ErrorKind
    param: str | None  # the field of the body
    code: str | None  # a reason for programs


class ErrorAnswer(msgspec.Struct):
    error: ErrorFields


def error_fields(error: RequestError) -> ErrorAnswer:
    kind: ErrorKind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return ErrorAnswer(ErrorFields(error.message, kind, error.param, error.code))


def error_body(error: RequestError) -> bytes:
    return msgspec.json.encode(error_fields(error))


def retry_headers(error: RequestError) -> dict[str, str]:
    """`Retry-After`, in whole seconds, where the same may be asked again."""
    if error.status not in (429, 503):
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s or 0.0)))}
