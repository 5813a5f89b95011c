"""A real server with keys: who gets in, and what becomes of a client that does not read."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flowkv.server.access.keys import add_key, new_key
from tests.e2e.server import Server, eventually, serving

ADMIN_KEY = new_key()
BODY = {"prompt": "hi", "max_tokens": 3}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By name; the file is under `file`."""
    path = tmp_path_factory.mktemp("keys") / "clients.keys"
    return {"file": str(path), "alice": add_key(path, "alice")}


@pytest.fixture(scope="module")
def server(keys: dict[str, str]) -> Iterator[Server]:
    arguments = ("--toy", "--api-key-file", keys["file"], "--set", "limits.slow_reader_s=0.3")
    with serving(*arguments, environment={"FLOWKV_ADMIN_KEY": ADMIN_KEY}) as server:
        yield server


def asking(server: Server, key: str | None) -> httpx.Client:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60.0)


def metrics(server: Server) -> str:
    with asking(server, ADMIN_KEY) as operator:
        return operator.get("/metrics").text


def test_who_gets_in(server: Server, keys: dict[str, str]) -> None:
    with (
        asking(server, None) as stranger,
        asking(server, keys["alice"]) as alice,
        asking(server, ADMIN_KEY) as operator,
    ):
        assert stranger.get("/health").status_code == stranger.get("/ready").status_code == 200
        assert alice.post("/v1/completions", json=BODY).status_code == 200
        for client in (stranger, operator):
            assert client.post("/v1/completions", json=BODY).status_code == 401
        for client in (stranger, alice):
            for path in ("/metrics", "/cluster", "/dashboard", "/requests", "/debug/trace"):
                assert client.get(path).status_code == 401
            for path in ("/admin/drain", "/admin/restart", "/admin/flip"):
                assert client.post(path).status_code == 401
        assert operator.get("/cluster").status_code == 200
        assert operator.post("/admin/flip", params={"instance": "nobody", "role": "mixed"}).status_code == 404
        assert stranger.get("/ready").status_code == 200  # nobody has drained it
        assert keys["alice"] not in "".join(server.lines) and ADMIN_KEY not in "".join(server.lines)
        shown = "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in server.processes())
        assert ADMIN_KEY not in shown


def test_a_client_that_does_not_read_has_its_request_aborted_everywhere(server: Server, keys: dict[str, str]) -> None:
    body = '{"prompt": "hi", "max_tokens": 3000, "n": 32, "ignore_eos": true, "stream": true}'
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
        client.connect((host, port))
        head = f"Host: localhost\r\nAuthorization: Bearer {keys['alice']}\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}{body}".encode())
        counted = 'flowkv_rejections_total{reason="slow_reader"} 1.0'
        eventually(lambda: counted in metrics(server), "it was cut off", 60.0)

    def is_free() -> bool:
        used = re.findall(r"^flowkv_instance_blocks_used{.*} (\S+)$", metrics(server), re.M)
        return len(used) == 2 and set(map(float, used)) == {0.0}

    eventually(is_free, "every block is free")
    aborted = re.search(r'flowkv_choices_finished_total{finish_reason="abort"} (\S+)', metrics(server))
    assert aborted is not None and float(aborted[1]) > 0


def test_a_key_can_be_added_and_taken_back_while_it_serves(server: Server, keys: dict[str, str]) -> None:
    path = Path(keys["file"])
    bob = add_key(path, "bob")
    with asking(server, bob) as client:
        eventually(lambda: client.get("/v1/models").status_code == 200, "the new key opens it")
        path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("bob:")))
        eventually(lambda: client.get("/v1/models").status_code == 401, "and then does not")
