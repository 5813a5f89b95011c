"""The frontend's process: the port first, then the tokenizer, then requests until it is drained or told to end."""

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
import zmq

from flowkv.auth import ClusterKey
from flowkv.config import LimitsConfig, ServerConfig, TracingConfig
from flowkv.errors import FlowKVError
from flowkv.messages import Note, Ready, Serving, StartFailed
from flowkv.server.access.site import Site
from flowkv.server.app import create_app
from flowkv.server.draining import Draining
from flowkv.server.frontend import Frontend
from flowkv.server.heap import give_large_blocks_back
from flowkv.server.records.journal import Listener
from flowkv.server.records.tracing import sending_spans
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.server.text.tokenizer import ModelTokenizer, Tokenizer
from flowkv.signals import DRAIN_SIGNAL, END_SIGNAL
from flowkv.wire import AsyncMailbox, Outbox, SyncContext

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
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)


def run_frontend(spec: FrontendSpec) -> int:
    """Serve until END_SIGNAL, or a while longer from DRAIN_SIGNAL on; returns the exit status.

    The launcher gets `StartFailed` with one line, or `Ready` with the URL (a port of 0 is any free one) and, when the
    cluster is ready too, `Serving`.
    """
    give_large_blocks_back()
    context: SyncContext = zmq.Context()
    outbox = Outbox(context, spec.key)
    try:
        with (
            Site(spec.server, spec.limits) as site,
            sending_spans(spec.tracing, os.environ, spec.model_name) as listeners,
        ):
            tokenizer = _tokenizer(spec)
            early: list[int] = []  # END_SIGNAL, before the event loop takes it; an exception would break the loop
            signal.signal(END_SIGNAL, lambda number, _: early.append(number))
            uvloop.run(
                _serve(spec, site, lambda: _frontend(spec, context, outbox, tokenizer, listeners), outbox, early)
            )
    except FlowKVError as error:
        outbox.send(spec.launcher_address, StartFailed(spec.name, str(error)))
        return 1
    finally:
        outbox.close(LINGER_S)
        context.term()
    return 0


def _tokenizer(spec: FrontendSpec) -> Tokenizer:
    return ByteTokenizer() if spec.model_folder is None else ModelTokenizer(Path(spec.model_folder))


def _frontend(
    spec: FrontendSpec, context: SyncContext, outbox: Outbox, tokenizer: Tokenizer, listeners: list[Listener]
) -> Frontend:
    """Inside the event loop. `listeners` hear of each request that ends."""
    frontend = Frontend(
        spec.name, AsyncMailbox(context, spec.address, spec.key), outbox, spec.controller_address, tokenizer,
        on_ready=lambda: outbox.send(spec.launcher_address, Serving(spec.name)), limits=spec.limits,
        num_kept=spec.tracing.keep_requests,
        tell_launcher=lambda message: outbox.send(spec.launcher_address, message),
    )  # fmt: skip
    for listener in listeners:
        frontend.journal.listen(listener)
    return frontend


async def _serve(
    spec: FrontendSpec, site: Site, make_frontend: Callable[[], Frontend], outbox: Outbox, early: list[int]
) -> None:
    frontend = make_frontend()
    app = create_app(frontend, spec.model_name, spec.server)

    def announce() -> None:
        outbox.send(spec.launcher_address, Ready(spec.name, site.urls[0]))
        for text in site.notes:
            outbox.send(spec.launcher_address, Note(text))

    servers = site.servers(app, frontend.count_refused, announce)

    def stop() -> None:
        frontend.close()
        for server in servers:
            server.should_exit = True

    draining = Draining(
        frontend, spec.server.drain_timeout_s, lambda text: outbox.send(spec.launcher_address, Note(text)), stop
    )  # fmt: skip
    asyncio.get_running_loop().add_signal_handler(END_SIGNAL, stop)
    asyncio.get_running_loop().add_signal_handler(DRAIN_SIGNAL, draining.begin)
    if early:
        stop()
    try:
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(frontend.run())
            await asyncio.gather(*(server.run_until_told() for server in servers))
            receiving.cancel()
    finally:
        frontend.close_mailbox()
