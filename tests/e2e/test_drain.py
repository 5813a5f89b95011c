"""Real processes that are told to stop while they have something to do: what runs finishes, nothing new comes in."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import Launched, Server, cleared_up, eventually, pause, serving
from tests.e2e.test_toy_cluster import CHECKED, toy_tokens

SLOW_STEPS = ("--set", "toy_step_s=0.02")
Answer = tuple[str, str | None]  # text, finish reason


def body(i: int, max_tokens: int) -> dict[str, Any]:
    return {"prompt": [i] * 40, "max_tokens": max_tokens, "temperature": 0.0}


@contextmanager
def streaming(server: Server, count: int, max_tokens: int) -> Iterator[list["Future[Answer]"]]:
    """Answers that have begun, each read by a thread."""
    begun = [threading.Event() for _ in range(count)]

    def read(i: int) -> Answer:
        text, finish_reason = "", None
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body(i, max_tokens) | {"stream": True}, timeout=60.0
        ) as response:  # fmt: skip
            for line in response.iter_lines():
                begun[i].set()
                data = json.loads(line.removeprefix("data: ")) if line not in ("", "data: [DONE]") else {}
                for choice in data.get("choices", []):
                    text += choice["text"]
                    finish_reason = choice["finish_reason"] or finish_reason
        return text, finish_reason

    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(read, i) for i in range(count)]
        assert all(event.wait(30.0) for event in begun)
        yield answers


def finished(count: int, max_tokens: int) -> list[Answer]:
    texts = toy_tokens({str(i): body(i, max_tokens) for i in range(count)})
    return [(texts[str(i)][0], "length") for i in range(count)]


def test_what_runs_finishes_and_what_comes_is_sent_away_with_a_time_to_come_back() -> None:
    with serving(*CHECKED, *SLOW_STEPS) as server, streaming(server, 4, max_tokens=100) as answers:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line(re.compile("draining: 4 requests, at most 30 s; Ctrl-C again stops at once"))
        refused = server.client.post("/v1/completions", json=body(9, 1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        assert [answer.result(30.0) for answer in answers] == finished(4, 100)
        assert server.wait() == 0


def test_a_second_signal_does_not_wait() -> None:
    with serving(*CHECKED, *SLOW_STEPS) as server, streaming(server, 2, max_tokens=5000) as answers:
        server.process.send_signal(signal.SIGINT)
        server.wait_for_line(re.compile("draining"))
        while server.process.poll() is None:  # two at a time are one
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert server.wait() == 0
        assert [answer.result(30.0)[1] for answer in answers] == ["abort", "abort"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_reaches_the_launcher_alone_and_once(signum: signal.Signals) -> None:
    """As `timeout` sends it, a closed terminal, and systemd unless told otherwise; the fork server is needed still."""
    with serving(*CHECKED, *SLOW_STEPS) as server, streaming(server, 4, max_tokens=100) as answers:
        pause(server.pid)  # it finds two of them at once, however slowly they are sent
        server.process.send_signal(signal.SIGINT)
        os.killpg(server.pid, signum)
        server.process.send_signal(signal.SIGCONT)
        server.wait_for_line(re.compile("draining: 4 requests"))
        os.kill(server.pid_of("decode-0"), signal.SIGKILL)
        assert [answer.result(30.0) for answer in answers] == finished(4, 100)
        assert server.wait() == 0
        assert any("decode-0 was killed by SIGKILL; starting it again" in line for line in server.lines)
        assert not any("resource_tracker" in line for line in server.lines)


def test_what_takes_too_long_is_ended() -> None:
    timeout = ("--set", "server.drain_timeout_s=0.2")
    with serving(*CHECKED, *SLOW_STEPS, *timeout) as server, streaming(server, 2, max_tokens=5000) as answers:
        assert server.stop() == 0
        assert [answer.result(30.0)[1] for answer in answers] == ["abort", "abort"]
        assert any("2 of 2 requests did not end within 0.2 s" in line for line in server.lines)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_without_requests_ends_at_once(signum: signal.Signals) -> None:
    with serving(*CHECKED) as server:
        assert server.stop(signum) == 0
        assert not any("draining" in line for line in server.lines)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_what_comes_while_torch_is_loaded_leaves_nothing_behind(signum: signal.Signals) -> None:
    """The fork server takes seconds for it. numpy's threads in the launcher take signals that the thread which starts a
    process has blocked."""
    command = ("serve", "--port", "0", "--mixed", "1", "--kv-memory", "16MiB")
    threads = {"OMP_NUM_THREADS": "2"}
    with cleared_up(Launched(command, re.compile("mixed-0: starting"), environment=threads)) as launched:
        eventually(lambda: any(map(is_fork_server, launched.processes())), "it has been asked for an instance")
        assert launched.stop(signum) == (0 if signum == signal.SIGTERM else -signum)
        eventually(lambda: launched.processes() == [], "every process is gone")
        assert not any("serving at" in line for line in launched.lines)


def is_fork_server(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        return b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def test_a_frontend_that_dies_meanwhile_is_not_followed_by_another() -> None:
    with serving(*CHECKED, *SLOW_STEPS) as server, streaming(server, 2, max_tokens=100) as answers:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line(re.compile("draining"))
        frontend = server.pid_of("frontend")
        os.kill(frontend, signal.SIGKILL)
        assert server.wait() == 0
        for answer in answers:
            with pytest.raises(httpx.RemoteProtocolError):
                answer.result(30.0)
        eventually(lambda: server.processes() == [], "everything has ended")


def test_an_operator_may_ask_for_it() -> None:
    with serving(*CHECKED, *SLOW_STEPS) as server, streaming(server, 2, max_tokens=100) as answers:
        assert server.client.post("/admin/drain").json() == {"num_requests": 2, "timeout_s": 30.0}
        assert [answer.result(30.0) for answer in answers] == finished(2, 100)
        assert server.wait() == 0
