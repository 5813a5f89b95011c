import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from flowkv.errors import ConfigError
from flowkv.remote import Remote
from flowkv.server.api.admin import Restarted
from flowkv.server.records.cluster_view import ClusterView
from flowkv.types import Regime

Asked = tuple[str, str, str | None]  # method, path, authorization


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[Asked]]]:
    asked: list[Asked] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.command, self.path, self.headers.get("authorization")))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815  (as BaseHTTPRequestHandler has it)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_a_view_comes_over_http_as_it_is() -> None:
    view = ClusterView(time_s=1.0, regime=Regime.IMBALANCED)
    with answering(200, msgspec.json.encode(view)) as (url, _):
        bare = url.removeprefix("http://")
        assert Remote(url, {}).view() == Remote(f"{url}/", {}).view() == Remote(bare, {}).view() == view


def test_a_key_goes_with_every_call() -> None:
    answer = Restarted(["decode-0"], "token")
    with answering(200, msgspec.json.encode(answer)) as (url, asked):
        query = [("instance", "decode-0"), ("instance", "a b")]
        assert Remote(url, {"FLOWKV_ADMIN_KEY": "secret\n"}).post("/admin/restart", Restarted, query) == answer
        assert asked == [("POST", "/admin/restart?instance=decode-0&instance=a+b", "Bearer secret")]


def test_why_it_is_refused_is_one_line() -> None:
    body = b'{"error": {"message": "there is no key", "type": "x"}}'
    with answering(401, body) as (url, _), pytest.raises(ConfigError, match=f"^{url}: there is no key$"):
        Remote(url, {}).view()


@pytest.mark.parametrize(("code", "body"), [(404, b"{}"), (200, b"<html>"), (200, b'{"time_s": "now"}')])
def test_another_server_is_one_line(code: int, body: bytes) -> None:
    with answering(code, body) as (url, _), pytest.raises(ConfigError, match=f"what answers at {url} is no FlowKV"):
        Remote(url, {}).view()
    with pytest.raises(ConfigError, match=f"nothing answers at {url}"):
        Remote(url, {}).view()


def test_an_address_that_cannot_be_is_one_line() -> None:
    with pytest.raises(ConfigError, match="http://\\[::1"):
        Remote("http://[::1", {}).view()
