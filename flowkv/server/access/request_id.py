"""`X-Request-Id`: taken from the client or made here, and shown with every answer."""

import re
import uuid
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
_SANE = re.compile(rb"[A-Za-z0-9._:-]{1,64}")  # what goes into logs and every message of a request


@dataclass(frozen=True, slots=True)
class RequestId:
    text: str
    is_ours: bool

    @classmethod
    def of(cls, sent: bytes | None) -> "RequestId":
        """The client's, if it is one that a log line can hold."""
        if sent is not None and _SANE.fullmatch(sent):
            return cls(sent.decode("ascii"), False)
        return cls(uuid.uuid4().hex, True)

    def unique(self) -> str:
        """Begins with what the client knows, and is no other request's even where a client repeats itself."""
        return self.text if self.is_ours else f"{self.text}-{uuid.uuid4().hex[:16]}"


class RequestIds:
    """Around a whole application, so that its errors have the header too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == HEADER), None)
        request_id = RequestId.of(sent)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (HEADER, request_id.text.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


def request_id_of(request: Request) -> RequestId:
    found: RequestId = request.state.request_id
    return found
