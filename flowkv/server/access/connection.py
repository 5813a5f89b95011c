"""One client's connection, with bounds on its patience and on ours.

uvicorn has no limit on headers, none on how slowly a request may come, and none on how slowly an answer may be read.
Each connection notes what it waits for since when; once a second the server looks at all of them.

A request that offers to go on in another protocol (`Connection: Upgrade`: curl --http2, Java's HttpClient) is answered
as if it had not: the parser would take its body for the next request, so it gets the head once more, without the offer.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import httptools
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from flowkv.config import LimitsConfig
from flowkv.errors import RequestError
from flowkv.server.error_answer import error_body

# Longer than clients and proxies keep an idle connection (httpx 5 s, nginx 60 s): who asks closes it, or a request that
# is already on its way would be lost with it.
_KEEP_ALIVE_S = 75
_HEADER_OVERHEAD_BYTES = 4  # ": " and the end of the line
_HOP_HEADERS = (b"connection", b"proxy-connection", b"upgrade", b"http2-settings")  # of the offer of another protocol
_PHRASES = {400: "Bad Request", 431: "Request Header Fields Too Large"}

OnRefused = Callable[[int, str, str], None]  # status, reason, address


class Phase(Enum):
    """What a connection waits for, of its client."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()


@dataclass(frozen=True, slots=True)
class Bounds:
    max_header_bytes: int
    head_timeout_s: float
    body_timeout_s: float
    slow_reader_s: float

    @classmethod
    def of(cls, max_header_bytes: int, limits: LimitsConfig) -> "Bounds":
        return cls(max_header_bytes, limits.head_timeout_s, limits.body_timeout_s, limits.slow_reader_s)


@dataclass(slots=True)
class Patience:
    """Since when a client lets us wait. Pure; `now_s` may be read once for many."""

    bounds: Bounds
    phase: Phase
    since_s: float
    blocked_s: float | None = None  # since when it takes nothing of what is written

    def wait_for(self, phase: Phase, now_s: float) -> None:
        self.phase, self.since_s = phase, now_s

    def exhausted(self, now_s: float) -> str | None:
        """The reason to cut the client off, if there is one."""
        if self.blocked_s is not None and now_s - self.blocked_s >= self.bounds.slow_reader_s:
            return "slow_reader"
        if self.phase is Phase.HEAD and now_s - self.since_s >= self.bounds.head_timeout_s:
            return "slow_head"
        if self.phase is Phase.BODY and now_s - self.since_s >= self.bounds.body_timeout_s:
            return "slow_body"
        return None


class HttpConfig(Config):
    """uvicorn's, with what a `Connection` needs."""

    def __init__(
        self, app: ASGIApp, bounds: Bounds, on_refused: OnRefused, *, tls: ssl.SSLContext | None, shutdown_s: int
    ) -> None:
        super().__init__(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # whoever forwards can claim any address
            timeout_graceful_shutdown=shutdown_s,
            timeout_keep_alive=_KEEP_ALIVE_S,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )
        self.bounds = bounds
        self.on_refused = on_refused


class Connection(HttpToolsProtocol):
    def __init__(
        self,
        config: HttpConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._max_header_bytes = config.bounds.max_header_bytes
        self._on_refused = config.on_refused
        self._patience = Patience(config.bounds, Phase.HEAD, time.monotonic())
        self._num_header_bytes = 0  # parsed, of this request
        self._num_open_bytes = 0  # fed since the last of its headers was complete
        self._is_refused = False
        self._is_replayed = False  # this head is one that came with an offer, without it

    # --- from the transport ----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._patience.phase is Phase.NOTHING and self._is_idle:
            self._patience.wait_for(Phase.HEAD, time.monotonic())
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._patience.phase is Phase.HEAD:
            self._num_open_bytes += len(data)
            self._check_header_bytes(self._num_open_bytes)

    def pause_writing(self) -> None:
        self._patience.blocked_s = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._patience.blocked_s = None
        super().resume_writing()

    # --- from the parser -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._num_header_bytes = self._num_open_bytes = 0
        if self._patience.phase is not Phase.HEAD:
            self._patience.wait_for(Phase.HEAD, time.monotonic())
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_header_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header_bytes(len(name) + len(value) + _HEADER_OVERHEAD_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_refused:
            return
        if self.parser.should_upgrade():
            if self._is_replayed or self.parser.get_method() == b"CONNECT":
                self._refuse(400, "bad_http", "this server is no proxy, and speaks one protocol")
            return
        self._is_replayed = False
        self._patience.wait_for(Phase.BODY, time.monotonic())
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_refused and not self.parser.should_upgrade():
            self._patience.wait_for(Phase.NOTHING, time.monotonic())
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        try:
            while not self._is_refused:
                try:
                    return self.parser.feed_data(data)
                except httptools.HttpParserUpgrade as offer:
                    [num_read] = offer.args
                    data = self._head_without_offer() + data[num_read:]
                    self.parser = httptools.HttpRequestParser(self)  # the old one goes on believing in the offer
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's: is not answered
                    self._is_replayed = True
        except httptools.HttpParserError:
            self.send_400_response("this is no HTTP request")

    def _head_without_offer(self) -> bytes:
        """Of the request whose head has been read. After the answer the connection ends: who knows what follows."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in _HOP_HEADERS]
        return b"\r\n".join([*lines, b"connection: close", b"", b""])

    # --- refusing --------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(400, "bad_http", msg)

    def look(self, now_s: float) -> None:
        """Cut the client off if it has let us wait for too long. What it still has in here ends as if it had left."""
        if self.flow.read_paused:  # it is we who let it wait
            self._patience.since_s = now_s
        if self.transport.is_closing() and self._patience.blocked_s is None:
            self._patience.blocked_s = now_s  # what was written last has still to be read
        if (reason := self._patience.exhausted(now_s)) is None:
            return
        is_reserve = reason == "slow_head" and not self._num_header_bytes + self._num_open_bytes
        if not is_reserve:  # a browser's connection, opened in case that it is needed
            self._on_refused(408, reason, self._client)
        self.transport.abort()  # `close` would wait for the client to read

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _client(self) -> str:
        return self.client[0] if self.client else "somebody"

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        self._num_open_bytes = 0
        self._check_header_bytes(self._num_header_bytes)

    def _check_header_bytes(self, num_bytes: int) -> None:
        if num_bytes > self._max_header_bytes:
            self._refuse(431, "headers_too_large", f"the headers are larger than {self._max_header_bytes} bytes")

    def _refuse(self, status: int, reason: str, text: str) -> None:
        """Answer without the application. One that is being answered already is cut off: its bytes may not be mixed."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._on_refused(status, reason, self._client)
        if not self._is_idle:
            self.transport.abort()
            return
        body = error_body(RequestError(text, status=status, code=reason))
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
