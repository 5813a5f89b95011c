"""The real HTTP server and its gate, in front of an application that answers with what it was told."""

import asyncio
import http.client
import json
import logging
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from flowkv.config import LimitsConfig, ServerConfig
from flowkv.errors import ConfigError
from flowkv.metrics import FrontendMetrics
from flowkv.server.access.caller import current_caller
from flowkv.server.access.doors import Access
from flowkv.server.access.keys import add_key, digest_of, new_key
from flowkv.server.access.site import Site

TLS = Path(__file__).parent / "tls"
ALICE, BOB, OPERATOR = new_key(), new_key(), new_key()
KEYS = {"FLOWKV_API_KEYS": f"alice:{ALICE},bob:sha256:{digest_of(BOB).hex()} concurrent=1"}
LOTS = 64 << 20  # more than the kernel takes for a client that does not read


@dataclass
class Running:
    urls: list[str]
    metrics: FrontendMetrics
    is_held: threading.Event  # until it is set, /v1/hold does not answer
    stack: ExitStack  # of what is to be closed before the server
    num_holding: int = 0
    num_left: int = 0  # streams whose reader was cut off, or has gone

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.urls[0])
        assert url.port is not None
        return url.host, url.port

    def client(self, key: str | None = None, number: int = 0, **options: Any) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return self.stack.enter_context(
            httpx.Client(base_url=self.urls[number], headers=headers, timeout=20, **options)
        )

    def rejections(self) -> dict[str, float]:
        [family] = [
            family
            for family in text_string_to_metric_families(self.metrics.render().decode())
            if family.name == "flowkv_rejections"
        ]
        return {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total")}


def application(running: Running) -> Starlette:
    async def who(request: Request) -> Response:
        await request.body()
        return Response(current_caller().key.name)

    async def hold(request: Request) -> Response:
        running.num_holding += 1
        while not running.is_held.is_set():
            await asyncio.sleep(0.01)
        current_caller().spend(1000, 0.0)
        return Response("held")

    async def flood(request: Request) -> Response:
        async def pieces() -> Any:
            try:
                for _ in range(LOTS >> 16):
                    yield b"x" * (1 << 16)
            finally:
                running.num_left += 1

        return StreamingResponse(pieces())

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    every = ["GET", "POST"]
    routes = [
        Route("/v1/echo", echo, methods=every),
        Route("/v1/hold", hold, methods=every),
        Route("/v1/flood", flood),
        Route("/{path:path}", who, methods=every),
    ]
    return Starlette(routes=routes)


@contextmanager
def running_site(
    server: dict[str, Any] | None = None, limits: dict[str, Any] | None = None, environ: dict[str, str] | None = None
) -> Iterator[Running]:
    site = Site(ServerConfig(port=0, **(server or {})), LimitsConfig(**(limits or {})), environ or {})
    running = Running(site.urls, FrontendMetrics(lambda: None), threading.Event(), ExitStack())
    listening = threading.Event()
    servers = site.servers(application(running), running.metrics.count_refused, listening.set)

    async def serve() -> None:
        await asyncio.gather(*(server.run_until_told() for server in servers))

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert listening.wait(10)
        yield running
    finally:
        running.is_held.set()
        running.stack.close()
        for one in servers:
            one.should_exit = True
        thread.join()
        site.close()


def until(condition: Callable[[], bool]) -> None:
    """Time is what is tested here; the test's own limit is pytest's patience."""
    waiting = threading.Event()
    for _ in range(2000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not come true within 20 s")


def read_all(client: socket.socket) -> bytes:
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def test_keys_over_http(caplog: pytest.LogCaptureFixture) -> None:
    with running_site(environ=KEYS) as running:
        client, alice = running.client(), running.client(ALICE)
        assert client.get("/health").text == "anybody"
        refused = client.post("/v1/completions", json={})
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == 'Bearer realm="flowkv"'
        assert refused.json()["error"]["code"] == "missing_api_key"
        assert refused.headers["x-request-id"]
        assert alice.post("/v1/completions", json={}).text == "alice"
        assert running.client(BOB).get("/v1/models").text == "bob"
        assert running.client(new_key()).get("/v1/models").status_code == 401
        assert alice.get("/metrics").json()["error"]["code"] == "shut"
        assert running.rejections() == {"missing_api_key": 1, "invalid_api_key": 1, "shut": 1}
    lines = [record.message for record in caplog.records]
    assert any("turned away 127.0.0.1: missing_api_key: POST '/v1/completions'" in line for line in lines)
    assert not any(ALICE in line or BOB in line for line in lines)


def test_a_bug_of_the_gate_is_a_500_in_json_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Access, "admit", lambda *_: 1 // 0)
    with running_site() as running:
        for _ in range(2):
            answer = running.client().get("/v1/models")
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert running.rejections() == {"internal_error": 2}
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_operators_have_a_port_of_their_own() -> None:
    with running_site({"admin_port": 0}, environ=KEYS | {"FLOWKV_ADMIN_KEY": OPERATOR}) as running:
        assert running.client(OPERATOR).get("/metrics").status_code == 403
        assert running.client(OPERATOR, 1).get("/metrics").text == "admin"
        assert running.client(None, 1).get("/metrics").headers["www-authenticate"] == 'Basic realm="flowkv"'
        assert running.client(None, 1, auth=("me", OPERATOR)).post("/admin/drain").text == "admin"
        assert running.client(ALICE, 1).get("/v1/models").status_code == 403


def test_a_path_that_climbs_is_refused_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with running_site() as running:
        host, port = running.address
        for path in ("/v1/models/../../etc/passwd", "/v1/models/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%2f..%2fetc"):
            connection = http.client.HTTPConnection(host, port)
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, json.load(answer)["error"]["code"]) == (400, "bad_path")
            connection.close()
        assert running.rejections() == {"bad_path": 3}
    assert "etc/passwd" in caplog.text


def test_cors_is_off_and_can_be_opened_for_one_origin() -> None:
    asks = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    with running_site() as running:
        client = running.client()
        assert "access-control-allow-origin" not in client.options("/v1/completions", headers=asks).headers
        assert client.post("/v1/completions", headers={"origin": "https://chat.example"}).status_code == 403
    with running_site({"cors_origins": ["https://chat.example"]}, environ=KEYS) as running:
        client = running.client()
        allowed = client.options(
            "/v1/completions", headers=asks | {"access-control-request-headers": "authorization, x-stainless-os"}
        )
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert client.options("/v1/completions", headers=asks | {"origin": "https://evil"}).status_code == 400
        answer = running.client(ALICE).post("/v1/x", headers={"origin": "https://chat.example"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "Server-Timing" in answer.headers["access-control-expose-headers"]


# --- limits --------------------------------------------------------------------------------------------------------


def test_concurrency_of_a_key_and_of_all() -> None:
    with running_site(limits={"concurrent": 2}, environ=KEYS) as running:
        alice, bob = running.client(ALICE), running.client(BOB)
        threads = []
        for client in (bob, alice):
            threads.append(threading.Thread(target=client.post, args=("/v1/hold",)))
            threads[-1].start()
            until(lambda: running.num_holding == len(threads))
        refused = bob.post("/v1/hold")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "'bob'" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        busy = alice.post("/v1/hold")
        assert (busy.status_code, busy.json()["error"]["code"]) == (503, "server_busy")
        assert busy.headers["retry-after"] == "1"
        assert alice.get("/v1/models").status_code == 200  # to look is free
        running.is_held.set()
        for thread in threads:
            thread.join()
        assert bob.post("/v1/hold").text == "held"
        assert running.rejections() == {"rate_limit_exceeded": 1, "server_busy": 1}


def test_rates_and_their_headers() -> None:
    limits = {"key_requests_per_minute": 2, "key_tokens_per_minute": 6000}
    with running_site(limits=limits, environ=KEYS) as running:
        alice = running.client(ALICE)
        running.is_held.set()
        first = alice.post("/v1/hold")
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert 5000 <= int(first.headers["x-ratelimit-remaining-tokens"]) < 6000  # they come back meanwhile
        assert 4000 <= int(alice.post("/v1/hold").headers["x-ratelimit-remaining-tokens"]) < 5000
        refused = alice.post("/v1/hold")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30


def test_a_refusal_does_not_wait_for_the_body() -> None:
    with running_site(environ=KEYS) as running, socket.create_connection(running.address) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 401")


# --- clients that take their time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_one", [True, False])
def test_headers_that_are_too_large(is_one: bool, caplog: pytest.LogCaptureFixture) -> None:
    headers = b"X: " + b"x" * 5000 if is_one else b"\r\n".join(b"X%d: %s" % (n, b"x" * 50) for n in range(100))
    with running_site({"max_header_bytes": 4096}) as running:
        with socket.create_connection(running.address) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\n")
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 431")
        assert b'"code":"headers_too_large"' in answer
        with socket.create_connection(running.address) as client:  # and without an end
            client.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * 5000)
            assert read_all(client).startswith(b"HTTP/1.1 431")
        with socket.create_connection(running.address) as client:  # a path is one of them
            client.sendall(b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n")
            assert read_all(client).startswith(b"HTTP/1.1 431")
        fine = running.client()
        assert fine.post("/v1/x", content=b"x" * 100_000).status_code == 200
        assert fine.get("/health", headers={"x": "x" * 3000}).status_code == 200
        assert running.rejections() == {"headers_too_large": 3}
    assert "turned away 127.0.0.1: headers_too_large" in caplog.text


def test_what_is_no_http_is_a_400() -> None:
    with running_site() as running:
        with socket.create_connection(running.address) as client:
            client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 400") and b'"code":"bad_http"' in answer
        assert running.rejections() == {"bad_http": 1}


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize(
    "offer",
    [
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\n",
        b"Proxy-Connection: upgrade\r\nUpgrade: x\r\n",
    ],
)
@pytest.mark.parametrize("cut", [0, 1, None])  # of the body, what comes with the head
def test_the_body_of_a_request_that_offers_another_protocol_is_no_request(
    offer: bytes, framing: str, cut: int | None
) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    length, body = b"Content-Length: %d" % len(smuggled), smuggled
    if framing == "chunked":
        length, body = b"Transfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(smuggled), smuggled)
    with running_site() as running, socket.create_connection(running.address) as client:
        client.settimeout(20)
        client.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\n" + offer + length + b"\r\n\r\n" + body[:cut])
        if cut is not None:
            client.sendall(body[cut:])
        answer = read_all(client)
        assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\n" + smuggled) and b"connection: close" in answer
        assert running.rejections() == {}


def test_an_offer_of_another_protocol_is_not_taken_and_nobody_tunnels(caplog: pytest.LogCaptureFixture) -> None:
    with running_site() as running:
        for sent, status in (
            (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", b"200"),
            (b"CONNECT evil:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        ):
            with socket.create_connection(running.address) as client:
                client.settimeout(20)
                client.sendall(sent)
                answer = read_all(client)
            assert answer.startswith(b"HTTP/1.1 " + status) and answer.count(b"HTTP/1.1 ") == 1
        assert running.rejections() == {"bad_http": 1}
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET /health HTTP/1.1\r\nX:", "slow_head"),
        (b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1", "slow_body"),
    ],
)
def test_a_request_that_does_not_end_is_cut_off(sent: bytes, reason: str) -> None:
    limits = {"head_timeout_s": 0.1, "body_timeout_s": 0.1}
    with running_site(limits=limits) as running, socket.create_connection(running.address) as client:
        client.sendall(sent)
        assert read_all(client) == b""
        until(lambda: running.rejections() == {reason: 1})


def test_a_second_request_that_does_not_end_is_cut_off_too() -> None:
    limits = {"head_timeout_s": 0.1}
    with running_site(limits=limits) as running, socket.create_connection(running.address) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /health HTTP")
        read_all(client)
        until(lambda: running.rejections() == {"slow_head": 1})


def test_a_connection_kept_in_reserve_is_closed_without_a_word() -> None:
    with running_site(limits={"head_timeout_s": 0.1}) as running, socket.create_connection(running.address) as client:
        assert read_all(client) == b""
        assert running.rejections() == {}


def test_a_client_that_does_not_read_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    with running_site(limits={"slow_reader_s": 0.2}) as running, socket.create_connection(running.address) as client:
        client.sendall(b"GET /v1/flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: running.num_left == 1)
        assert running.rejections() == {"slow_reader": 1}
        assert len(read_all(client)) < LOTS
    assert "turned away 127.0.0.1: slow_reader" in caplog.text


def test_a_client_that_reads_gets_it_all() -> None:
    with running_site(limits={"slow_reader_s": 20.0}) as running:
        client = running.client()
        assert len(client.get("/v1/flood").content) == LOTS
        assert running.rejections() == {}


# --- tls -----------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str = "one") -> dict[str, str]:
    cert, key = folder / "crt", folder / "key"
    shutil.copyfile(TLS / f"{name}.crt", cert)
    shutil.copyfile(TLS / f"{name}.key", key)
    key.chmod(0o600)
    return {"tls_cert_file": str(cert), "tls_key_file": str(key)}


def trusting(name: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(TLS / f"{name}.crt"))


def test_https_and_a_new_certificate_without_a_restart(tmp_path: Path) -> None:
    with running_site(certificate(tmp_path)) as running:
        assert running.urls[0].startswith("https://")
        assert running.client(verify=trusting("one")).get("/health").text == "anybody"
        with pytest.raises(httpx.ConnectError):
            running.client(verify=trusting("two")).get("/health")
        certificate(tmp_path, "two")

        def has_changed() -> bool:
            try:
                return running.client(verify=trusting("two")).get("/health").status_code == 200
            except httpx.ConnectError:
                return False

        until(has_changed)


def test_a_certificate_that_does_not_do_stops_the_start(tmp_path: Path) -> None:
    config = certificate(tmp_path)
    shutil.copyfile(TLS / "two.key", config["tls_key_file"])
    with pytest.raises(ConfigError, match="do not do"), running_site(config):
        pass
    certificate(tmp_path)
    Path(config["tls_key_file"]).chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"), running_site(config):
        pass
    with pytest.raises(ConfigError, match="No such file"), running_site(config | {"tls_key_file": "none"}):
        pass
    with pytest.raises(ValueError, match="go together"):
        ServerConfig(tls_cert_file="x")


def test_a_renewal_that_is_broken_leaves_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running_site(certificate(tmp_path)) as running:
        (tmp_path / "crt").write_text("broken")
        with caplog.at_level(logging.ERROR):
            until(lambda: "the certificate that was read before stays" in caplog.text)
        assert running.client(verify=trusting("one")).get("/health").text == "anybody"


def test_a_key_file_is_watched(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first = add_key(path, "first")
    with running_site({"api_key_file": str(path)}) as running:
        assert running.client(first).get("/v1/models").text == "first"
        second = add_key(path, "second")
        until(lambda: running.client(second).get("/v1/models").status_code == 200)


def test_its_operator_is_told_what_is_open(tmp_path: Path) -> None:
    def notes(environ: dict[str, str], **server: Any) -> str:
        with Site(ServerConfig(port=0, **server), LimitsConfig(), environ) as site:
            return "; ".join(site.notes)

    assert notes({}) == ""
    assert "operators' pages are at http://127.0.0.1:" in notes({}, admin_port=0)
    everywhere = notes({}, host="0.0.0.0", insecure=True)
    assert "whoever reaches 0.0.0.0 may use this server" in everywhere and "in plain" in everywhere
    assert notes(KEYS, host="0.0.0.0").startswith("keys and prompts cross the network in plain on 0.0.0.0")
    assert notes(KEYS, host="0.0.0.0", **certificate(tmp_path)) == ""
