"""The frontend as a process of its own, with the launcher's side played by the test."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import zmq

from flowkv.errors import ConfigError
from flowkv.messages import Ready, StartFailed
from flowkv.server.access.site import listen
from flowkv.signals import END_SIGNAL
from flowkv.wire import Mailbox, decode
from tests.server.bpe import make_model_folder
from tests.server.fake_cluster import FakeCluster, outputs

MAIN = """
import sys
from flowkv.config import ServerConfig
from flowkv.server.process import FrontendSpec, run_frontend
host, port, mailbox, controller, launcher, folder, early = sys.argv[1:]
if early:  # told to stop while it starts
    import os
    from flowkv.server import process
    from flowkv.signals import END_SIGNAL
    create_app = process.create_app
    process.create_app = lambda *args: os.kill(os.getpid(), END_SIGNAL) or create_app(*args)
server = ServerConfig(host=host, port=int(port))
code = run_frontend(FrontendSpec("f0", mailbox, controller, launcher, server, folder or None, "toy"))
assert not {"torch", "transformers"} & set(sys.modules)
sys.exit(code)
"""


class Launcher:
    def __init__(self, folder: Path, controller_address: str) -> None:
        self._folder = folder
        self._controller_address = controller_address
        self._context = zmq.Context()
        self.mailbox = Mailbox(self._context, f"ipc://{folder}/launcher")

    def start(
        self, host: str = "127.0.0.1", port: int = 0, model_folder: str = "", early: str = ""
    ) -> "subprocess.Popen[bytes]":
        addresses = [f"ipc://{self._folder}/f0", self._controller_address, self.mailbox.address]
        command = [sys.executable, "-W", "error", "-c", MAIN, host, str(port), *addresses, model_folder, early]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE)
        return self._process

    def next_message(self) -> object:
        assert self.mailbox.socket.poll(20_000)
        return decode(self.mailbox.socket.recv())

    def close(self) -> None:
        self._process.kill()  # one that has ended is left alone
        self._process.communicate()
        self.mailbox.close()
        self._context.term()


def end_of(process: "subprocess.Popen[bytes]") -> tuple[int, bytes]:
    """Exit status, and what was written to stderr."""
    _, complaints = process.communicate(timeout=20)
    return process.returncode, complaints


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[FakeCluster]:
    with FakeCluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def launcher(tmp_path: Path, cluster: FakeCluster) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path, cluster.address)
    yield launcher
    launcher.close()


def test_serves_until_told_to_end_and_ends_open_streams(
    launcher: Launcher, cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.answer = lambda request: outputs(request, [33, 34])[:1]
    process = launcher.start(model_folder=str(make_model_folder(tmp_path / "model")))
    ready = launcher.next_message()
    assert isinstance(ready, Ready)
    assert ready.url.startswith("http://127.0.0.1:")
    while httpx.get(f"{ready.url}/ready").status_code != 200:
        pass
    url, body = f"{ready.url}/v1/completions", {"prompt": "hi", "max_tokens": 9}
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", url, json={**body, "stream": True}, timeout=10) as response,
    ):
        lines = response.iter_lines()
        assert '"text"' in next(lines)
        whole = pool.submit(httpx.post, url, json=body, timeout=10)
        cluster.wait_for(lambda: len({request.request_id for request in cluster.requests}) == 2)
        process.send_signal(END_SIGNAL)
        rest = "\n".join(lines)
    assert whole.result().status_code == 503  # a part must not be taken for the whole
    assert '"finish_reason":"abort"' in rest
    assert rest.rstrip().endswith("data: [DONE]")
    assert end_of(process) == (0, b"")
    # One may come twice: an output that was on its way when its request was forgotten is answered with an abort again.
    cluster.wait_for(lambda: len(set(cluster.aborts)) == 2)


def test_a_signal_that_comes_before_the_event_loop_runs_ends_it_too(launcher: Launcher) -> None:
    assert end_of(launcher.start(early="early")) == (0, b"")


def test_a_busy_port_is_one_line_to_the_launcher(launcher: Launcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        process = launcher.start(port=port)
        failed = launcher.next_message()
        assert isinstance(failed, StartFailed)
        assert failed.reason == f"cannot listen on 127.0.0.1 port {port}: Address already in use"
        assert end_of(process) == (1, b"")


def test_a_port_is_taken_from_the_moment_that_it_is_bound() -> None:
    with listen("127.0.0.1", 0) as first:
        with pytest.raises(ConfigError, match="in use"):
            listen("127.0.0.1", first.getsockname()[1])
        socket.create_connection(first.getsockname()).close()


def test_a_host_that_is_not_here_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="no such host"):
        listen("no such host", 0)


def test_a_folder_without_tokenizer_is_one_line_to_the_launcher(launcher: Launcher, tmp_path: Path) -> None:
    process = launcher.start(model_folder=str(tmp_path))
    failed = launcher.next_message()
    assert isinstance(failed, StartFailed)
    assert "tokenizer.json" in failed.reason
    assert "\n" not in failed.reason
    assert end_of(process) == (1, b"")
