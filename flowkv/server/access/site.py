"""Where a frontend is reached: its listeners, each with a gate, and the HTTP server behind it."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from flowkv.config import LimitsConfig, ServerConfig
from flowkv.errors import ConfigError
from flowkv.server.access.connection import Bounds, Connection, HttpConfig
from flowkv.server.access.doors import API_KEYS_VARIABLE, Access, access_of, is_loopback
from flowkv.server.access.gate import Gate
from flowkv.server.access.quotas import QuotaLimits, Quotas
from flowkv.server.access.refusals import Refusals
from flowkv.server.access.request_id import RequestIds
from flowkv.server.access.tls import Certificate

SHUTDOWN_S = 5  # for clients to take the ends of their streams
_TICKS_PER_LOOK = 10  # of a tenth of a second
_SEND_BUFFER_BYTES = 256 << 10  # of a connection, in the kernel: what a client leaves unread must not grow there
_BACKLOG = 1024
_CORS_HEADERS = ("*",)  # clients add their own: openai-node sends x-stainless-...
_CORS_EXPOSED = (
    "X-Request-Id", "Server-Timing", "Retry-After", "X-RateLimit-Remaining-Requests", "X-RateLimit-Remaining-Tokens"
)  # fmt: skip


class Site:
    """Open before anything loads, so that what is wrong with it is known at once. Close it when done."""

    def __init__(self, config: ServerConfig, limits: LimitsConfig, environ: Mapping[str, str] = os.environ) -> None:
        """ConfigError for an address that is taken or open to strangers, for keys and for certificates."""
        self._config = config
        self._bounds = Bounds.of(config.max_header_bytes, limits)
        self._quotas = Quotas(
            QuotaLimits(limits.concurrent, limits.requests_per_minute, limits.tokens_per_minute),
            QuotaLimits(limits.key_concurrent, limits.key_requests_per_minute, limits.key_tokens_per_minute),
        )
        main, admin = access_of(config, environ)
        self._has_api_keys = config.api_key_file is not None or bool(environ.get(API_KEYS_VARIABLE, "").strip())
        self._certificate = Certificate.of(config)
        self._listeners: list[tuple[socket.socket, Access]] = [(listen(config.host, config.port), main)]
        if config.admin_port is not None:
            try:
                self._listeners.append((listen(config.admin_host, config.admin_port), admin))
            except ConfigError:
                self.close()
                raise

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for listener, _ in self._listeners:
            listener.close()

    @property
    def urls(self) -> list[str]:
        """Of clients' port, and of operators' where they have one."""
        scheme = "http" if self._certificate is None else "https"
        return [_url(scheme, listener) for listener, _ in self._listeners]

    @property
    def notes(self) -> list[str]:
        """What its operator should know."""
        host, (_, *operators_urls) = self._config.host, self.urls
        found = [f"operators' pages are at {url}" for url in operators_urls]
        if is_loopback(host):
            return found
        if not self._has_api_keys:
            found.append(f"whoever reaches {host} may use this server (--insecure)")
        if self._certificate is None:
            found.append(f"keys and prompts cross the network in plain on {host}: --tls-cert-file encrypts them")
        return found

    def servers(
        self, app: ASGIApp, count_refused: Callable[[int, str], None], on_listening: Callable[[], None]
    ) -> list["Server"]:
        """One a listener. `count_refused(status, reason)` hears of all who are turned away, `on_listening` that
        clients' port listens."""
        refusals = Refusals(count_refused)
        calls = [on_listening, lambda: None]
        return [
            Server(self._http(app, access, refusals), listener, call, self._certificate)
            for (listener, access), call in zip(self._listeners, calls, strict=False)
        ]

    def _http(self, app: ASGIApp, access: Access, refusals: Refusals) -> HttpConfig:
        gate: ASGIApp = RequestIds(Gate(app, access, self._quotas, refusals))
        if origins := self._config.cors_origins:
            gate = CORSMiddleware(
                gate, origins, ("GET", "POST"), _CORS_HEADERS, allow_private_network=True, expose_headers=_CORS_EXPOSED
            )
        tls = None if self._certificate is None else self._certificate.context
        return HttpConfig(gate, self._bounds, refusals.note, tls=tls, shutdown_s=SHUTDOWN_S)


class Server(uvicorn.Server):
    """uvicorn, less its signal handlers, with a call when it listens, and an eye on its connections."""

    def __init__(
        self,
        config: HttpConfig,
        listener: socket.socket,
        on_listening: Callable[[], None],
        certificate: Certificate | None = None,
    ) -> None:
        super().__init__(config)
        self._listener = listener
        self._on_listening = on_listening
        self._certificate = certificate

    async def run_until_told(self) -> None:
        """To exit, by `should_exit`."""
        await self.serve(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_LOOK == 0:
            self._look()
        return await super().on_tick(counter)

    def _look(self) -> None:
        if self._certificate is not None:
            self._certificate.refresh()
        now_s = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.look(now_s)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises `ConfigError` where the port is taken or the host is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on host {host!r}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(_BACKLOG)  # bound alone, the port could still be taken by somebody else
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def _url(scheme: str, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{scheme}://{host}:{port}"
