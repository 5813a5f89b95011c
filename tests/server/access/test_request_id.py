import socket

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.server.access.request_id import RequestId
from tests.server.conftest import Served


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", {"prompt": "hi"}, 200),
        ("POST", "/v1/completions", {"prompt": "hi", "stream": True}, 200),
        ("POST", "/v1/completions", {"prompt": ""}, 400),
        ("GET", "/nothing", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/health", None, 200),
    ],
)
def test_every_answer_has_the_clients_id(
    served: Served, method: str, path: str, body: dict[str, object] | None, status: int
) -> None:
    response = served.client.request(method, path, json=body, headers={"X-Request-Id": "job-17"})
    assert response.status_code == status
    assert response.headers.get_list("x-request-id") == ["job-17"]


def test_a_bug_has_the_clients_id_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowkv.server.api.text_service.build_request", lambda *_: 1 / 0)
    # A connection of its own: the server closes it after the traceback.
    response = httpx.post(f"{served.url}/v1/completions", json={"prompt": "hi"}, headers={"X-Request-Id": "job-17"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "job-17")


def test_a_repeated_id_makes_different_requests_that_begin_with_it(served: Served) -> None:
    for _ in range(2):
        answer = served.client.post("/v1/completions", json={"prompt": "hi"}, headers={"X-Request-Id": "job-17"})
        assert answer.json()["id"].startswith("cmpl-job-17-")
    ids = [request.request_id for request in served.cluster.requests]
    assert all(request_id.startswith("cmpl-job-17-") for request_id in ids)
    assert len(set(ids)) == 2


def test_an_id_is_made_where_none_is_sent(served: Served) -> None:
    answer = served.client.post("/v1/completions", json={"prompt": "hi"})
    assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"


def test_an_id_that_no_log_can_hold_is_replaced(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    for sent in (b"a b", b"x" * 65, b"caf\xe9", b""):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + sent + b"\r\n\r\n")
            head = client.recv(4096).lower()
        shown = head.split(b"x-request-id: ")[1].split(b"\r\n")[0]
        assert len(shown) == 32 and shown != sent


@given(st.binary(max_size=80))
def test_what_is_shown_is_always_one_word(sent: bytes) -> None:
    request_id = RequestId.of(sent)
    assert request_id.text.isprintable() and " " not in request_id.text and 0 < len(request_id.text) <= 64
    assert request_id.is_ours == (request_id.text.encode() != sent)
    assert request_id.unique().startswith(request_id.text)
