"""The frontend's process: the port first, then the tokenizer, then requests until it is drained or SIGTERM comes."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
import uvloop
import zmq
from starlette.types import ASGIApp

from flowkv.auth import ClusterKey
from flowkv.config import ServerConfig
from flowkv.errors import ConfigError, FlowKVError
from flowkv.messages import Note, Ready, Serving, StartFailed
from flowkv.server.app import create_app
from flowkv.server.byte_tokenizer import ByteTokenizer
from flowkv.server.draining import Draining
from flowkv.server.frontend import Frontend
from flowkv.server.tokenizer import ModelTokenizer, Tokenizer
from flowkv.wire import AsyncMailbox, Outbox, SyncContext

SHUTDOWN_S = 5  # for clients to take the ends of their streams
DRAIN_SIGNAL = signal.SIGUSR1  # once it is ready: end when the last request has
LINGER_S = 1.0  # for the last messages to leave


@dataclass(frozen=True, slots=True)
class FrontendSpec:
    """All that a new process needs to become a frontend."""

    name: str
    address: str  # mailbox
    controller_address: str
    launcher_address: str
    server: ServerConfig
    model_folder: str | None  # None: toy serving, where tokens are bytes
    model_name: str
    key: ClusterKey | None = None  # for mailboxes on tcp


def run_frontend(spec: FrontendSpec) -> int:
    """Serve until SIGTERM, or a while longer from DRAIN_SIGNAL on; returns the exit status.

    The launcher gets `StartFailed` with one line, or `Ready` with the URL (a port of 0 is any free one) and, when the
    cluster is ready too, `Serving`.
    """
    # Ctrl-C reaches every process of the terminal's group: in which order they end is the launcher's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context: SyncContext = zmq.Context()
    outbox = Outbox(context, spec.key)
    try:
        with listen(spec.server.host, spec.server.port) as listener:
            tokenizer = _tokenizer(spec)
            uvloop.run(_serve(spec, listener, lambda: _frontend(spec, context, outbox, tokenizer), outbox))
    except FlowKVError as error:
        outbox.send(spec.launcher_address, StartFailed(spec.name, str(error)))
        return 1
    finally:
        outbox.close(LINGER_S)
        context.term()
    return 0


def _tokenizer(spec: FrontendSpec) -> Tokenizer:
    return ByteTokenizer() if spec.model_folder is None else ModelTokenizer(Path(spec.model_folder))


def _frontend(spec: FrontendSpec, context: SyncContext, outbox: Outbox, tokenizer: Tokenizer) -> Frontend:
    """Inside the event loop."""
    return Frontend(
        spec.name, AsyncMailbox(context, spec.address, spec.key), outbox, spec.controller_address, tokenizer,
        on_ready=lambda: outbox.send(spec.launcher_address, Serving(spec.name)),
    )  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises `ConfigError` where the port is taken or the host is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on host {host!r}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # bound alone, the port could still be taken by somebody else
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


async def _serve(
    spec: FrontendSpec, listener: socket.socket, make_frontend: Callable[[], Frontend], outbox: Outbox
) -> None:
    frontend = make_frontend()
    app = create_app(frontend, spec.model_name, spec.server)
    server = Server(app, lambda: outbox.send(spec.launcher_address, Ready(spec.name, _url(listener))))

    def stop() -> None:
        frontend.close()
        server.should_exit = True

    draining = Draining(
        frontend, spec.server.drain_timeout_s, lambda text: outbox.send(spec.launcher_address, Note(text)), stop
    )  # fmt: skip
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    asyncio.get_running_loop().add_signal_handler(DRAIN_SIGNAL, draining.begin)
    try:
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(frontend.run())
            await server.serve(sockets=[listener])
            receiving.cancel()
    finally:
        frontend.close_mailbox()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, less its signal handlers, and with a call when it listens."""

    def __init__(self, app: ASGIApp, on_listening: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
