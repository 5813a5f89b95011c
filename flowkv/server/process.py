"""The frontend's process: the port first, then the tokenizer, then requests until SIGTERM."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
import uvloop
import zmq
from starlette.types import ASGIApp

from flowkv.auth import ClusterKey
from flowkv.errors import ConfigError, FlowKVError
from flowkv.messages import Ready, Serving, StartFailed
from flowkv.server.app import DEFAULT_MAX_BODY_BYTES, create_app
from flowkv.server.byte_tokenizer import ByteTokenizer
from flowkv.server.frontend import Frontend
from flowkv.server.tokenizer import ModelTokenizer, Tokenizer
from flowkv.wire import AsyncMailbox, Outbox, SyncContext

SHUTDOWN_S = 5  # for clients to take the ends of their streams
LINGER_S = 1.0  # for the last messages to leave


def run_frontend(
    host: str,
    port: int,
    mailbox_address: str,
    controller_address: str,
    launcher_address: str,
    name: str,
    model_folder: str | None,
    model_name: str,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    key: ClusterKey | None = None,
) -> int:
    """Serve until SIGTERM; returns the exit status. `model_folder` None is toy serving, where tokens are bytes.

    `key` is for mailboxes on tcp. The launcher gets `StartFailed` with one line, or `Ready` with the URL (a `port` of 0
    is any free one) and, when the cluster is ready too, `Serving`.
    """
    # Ctrl-C reaches every process of the terminal's group: in which order they end is the launcher's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context: SyncContext = zmq.Context()
    outbox = Outbox(context, key)

    def make_frontend() -> Frontend:
        mailbox = AsyncMailbox(context, mailbox_address, key)
        return Frontend(
            name, mailbox, outbox, controller_address, tokenizer,
            on_ready=lambda: outbox.send(launcher_address, Serving(name)),
        )  # fmt: skip

    def announce(url: str) -> None:
        outbox.send(launcher_address, Ready(name, url))

    try:
        with listen(host, port) as listener:
            tokenizer: Tokenizer = ByteTokenizer() if model_folder is None else ModelTokenizer(Path(model_folder))
            uvloop.run(_serve(listener, make_frontend, model_name, max_body_bytes, announce))
    except FlowKVError as error:
        outbox.send(launcher_address, StartFailed(name, str(error)))
        return 1
    finally:
        outbox.close(LINGER_S)
        context.term()
    return 0


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
    listener: socket.socket,
    make_frontend: Callable[[], Frontend],
    model_name: str,
    max_body_bytes: int,
    announce: Callable[[str], None],
) -> None:
    frontend = make_frontend()
    server = Server(create_app(frontend, model_name, max_body_bytes), lambda: announce(_url(listener)))

    def stop() -> None:
        frontend.close()
        server.should_exit = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
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
