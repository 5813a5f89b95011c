import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import zmq

from flowkv.config import LimitsConfig, ServerConfig
from flowkv.server.access.site import Server, Site
from flowkv.server.app import create_app
from flowkv.server.frontend import Frontend
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.wire import AsyncMailbox, Outbox, SyncContext
from tests.server.fake_cluster import CONTEXT_TOKENS, FakeCluster, say, status

MAX_BODY_BYTES = 100_000


@dataclass(frozen=True)
class Served:
    url: str
    cluster: FakeCluster
    client: httpx.Client


@pytest.fixture(scope="module")
def server_config() -> ServerConfig:
    return ServerConfig(max_body_bytes=MAX_BODY_BYTES)


@pytest.fixture(scope="module")
def module_served(tmp_path_factory: pytest.TempPathFactory, server_config: ServerConfig) -> Iterator[Served]:
    """The real HTTP server on a port of its own, in a thread, in front of a fake cluster."""
    folder = tmp_path_factory.mktemp("run")
    site = Site(ServerConfig(port=0, max_body_bytes=MAX_BODY_BYTES), LimitsConfig(), environ={})
    [url] = site.urls
    started = threading.Event()
    servers: list[Server] = []
    context: SyncContext = zmq.Context()

    async def serve(controller_address: str) -> None:
        mailbox, outbox = AsyncMailbox(context, f"ipc://{folder}/frontend"), Outbox(context)
        frontend = Frontend("f0", mailbox, outbox, controller_address, ByteTokenizer(), beat_s=0.02)
        app = create_app(frontend, "toy", server_config)
        servers.extend(site.servers(app, frontend.count_refused, started.set))
        receiving = asyncio.create_task(frontend.run())
        await servers[0].run_until_told()
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        frontend.close_mailbox()
        outbox.close(linger_s=0)

    with FakeCluster(folder) as cluster, httpx.Client(base_url=url, timeout=10) as client:
        thread = threading.Thread(target=lambda: asyncio.run(serve(cluster.address)))
        thread.start()
        assert started.wait(10)
        yield Served(url, cluster, client)
        servers[0].should_exit = True
        thread.join()
    context.term()


@pytest.fixture
def served(module_served: Served) -> Served:
    """As new: ready, with nothing received, and answering "hello"."""
    cluster = module_served.cluster
    cluster.answer, cluster.status = say("hello"), status()
    while module_served.client.get("/v1/models/toy").json().get("max_model_len") != CONTEXT_TOKENS:
        pass
    cluster.received.clear()
    return module_served
