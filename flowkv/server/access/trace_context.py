"""The client's span, which that of its request belongs under: `traceparent` (W3C Trace Context)."""

import re
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = b"traceparent"
_VALID = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_traceparent: ContextVar[str | None] = ContextVar("flowkv_traceparent", default=None)


class TraceContext:
    """ASGI, around the application: whoever submits in the task of an HTTP request finds what came with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = next((value for name, value in scope.get("headers", ()) if name == HEADER), b"")
        _traceparent.set(sent.decode() if _VALID.fullmatch(sent) else None)
        await self._app(scope, receive, send)


def current_traceparent() -> str | None:
    return _traceparent.get()
