"""The gate before the application: nobody's HTTP request gets in without leave, and none more than its share.

All that it looks at is a request's head. Who is turned away has cost a parsed header and an answer.
"""

import time
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowkv.errors import RequestError
from flowkv.server.access.caller import Caller, set_caller
from flowkv.server.access.doors import Access, Audience, Call, Unauthorized
from flowkv.server.access.keys import ANYBODY, ApiKey
from flowkv.server.access.quotas import Quota, Quotas
from flowkv.server.access.refusals import Refusals
from flowkv.server.error_answer import error_body, retry_headers


class Gate:
    """ASGI. `quotas` are shared by the gates of all listeners."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        quotas: Quotas,
        refusals: Refusals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._access = access
        self._quotas = quotas
        self._refusals = refusals
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        call, now_s = _call(scope), self._clock()
        try:
            key = self._access.admit(call, now_s)
            asked = self._asked(call, key)
            _check_quotas(asked, key, now_s)
        except RequestError as error:
            self._note(scope, call, error)
            await _refusal(error)(scope, receive, send)
            return
        except Exception as bug:
            self._refusals.note_bug(call.path, bug)
            await _refusal(RequestError("internal error", status=500, code="internal_error"))(scope, receive, send)
            return
        await self._let_in(Caller(key, asked), scope, receive, send, now_s)

    def _asked(self, call: Call, key: ApiKey) -> tuple[Quota, ...]:
        """Whose limits it counts against. To look is free; what has a body makes work."""
        if call.method != "POST" or self._access.audience(call.path) is not Audience.CLIENTS:
            return ()
        if key is ANYBODY:
            return (self._quotas.everybody,)
        return (self._quotas.of(key.name, key.limits), self._quotas.everybody)

    async def _let_in(self, caller: Caller, scope: Scope, receive: Receive, send: Send, now_s: float) -> None:
        set_caller(caller)
        for quota in caller.quotas:
            quota.enter(now_s)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = caller.quotas[0].headers(self._clock())
                message = {**message, "headers": [*message["headers"], *found]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_limits if caller.quotas else send)
        finally:
            for quota in caller.quotas:
                quota.leave()

    def _note(self, scope: Scope, call: Call, error: RequestError) -> None:
        address, _ = scope.get("client") or ("somebody", 0)
        self._refusals.note(error.status, error.code or "refused", address, f"{call.method} {call.path!a:.100}")


def _call(scope: Scope) -> Call:
    """Of headers that come twice the last counts for nobody: Starlette, too, takes the first."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return Call(scope["method"], scope["path"], headers)


def _check_quotas(quotas: tuple[Quota, ...], key: ApiKey, now_s: float) -> None:
    """Raises `RequestError`: 429 for what a key has used up, 503 for what all have."""
    for quota in quotas:
        if (refusal := quota.refusal(now_s)) is None:
            continue
        if len(quotas) > 1 and quota is quotas[0]:
            text = f"the key {key.name!r}: {refusal.reason}"
            raise RequestError(text, status=429, code="rate_limit_exceeded", retry_after_s=refusal.retry_after_s)
        text = f"of all clients together: {refusal.reason}"
        raise RequestError(text, status=503, code="server_busy", retry_after_s=refusal.retry_after_s)


def _refusal(error: RequestError) -> Response:
    headers = retry_headers(error)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = error.challenge
    return Response(error_body(error), error.status, headers, "application/json")
