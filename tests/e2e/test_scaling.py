"""Real processes that come and go while requests are served: nothing is lost, and nobody is started who was ended."""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from flowkv.messages import StartInstance, StopInstance
from flowkv.types import Role
from tests.e2e.server import Server, eventually, serving
from tests.e2e.test_toy_cluster import TOY, check_all_free, complete, make_requests, toy_tokens

FIXED = ("--roles", "fixed")  # the controller adds and retires nobody by itself
HASTY = ("--set", "scheduling.interval_s=0.05")  # a tenth of the default: it need not see a load for long


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(*TOY, *FIXED, "--prefill", "1", "--decode", "1") as server:
        yield server


def instances(server: Server) -> set[str]:
    return set(server.gauge("flowkv_instance_blocks_total"))


def check_answers(server: Server, seed: int) -> None:
    requests = make_requests(8, seed)
    with ThreadPoolExecutor(4) as pool:
        answers = dict(zip(requests, pool.map(lambda body: complete(server, body), requests.values()), strict=True))
    assert answers == toy_tokens(requests)


def test_the_launcher_adds_an_instance_and_ends_it_for_good(server: Server) -> None:
    server.tell_launcher(StartInstance(Role.DECODE))
    server.wait_for_line(re.compile("added decode-1"))
    eventually(lambda: instances(server) == {"prefill-0", "decode-0", "decode-1"}, "it is known")
    check_answers(server, seed=1)
    os.kill(server.pid_of("decode-1"), signal.SIGKILL)  # it is started again like any other
    server.wait_for_line(re.compile("decode-1~1: ready"))
    eventually(lambda: "decode-1~1" in instances(server), "its successor is known")
    num_processes = len(server.processes())
    server.tell_launcher(StopInstance("decode-1~1"))
    server.wait_for_line(re.compile("retired decode-1~1"))
    eventually(lambda: instances(server) == {"prefill-0", "decode-0"}, "it is forgotten")
    assert len(server.processes()) == num_processes - 1
    assert not any("decode-1~2" in line for line in server.lines)
    check_answers(server, seed=2)
    server.tell_launcher(StartInstance(Role.DECODE))
    server.wait_for_line(re.compile("added decode-2"))  # no name is used twice
    check_answers(server, seed=3)
    check_all_free(server)


def test_the_end_of_an_instance_that_has_ended_already_is_nothing(server: Server) -> None:
    os.kill(server.pid_of("decode-0"), signal.SIGKILL)
    server.tell_launcher(StopInstance("decode-0"))
    server.tell_launcher(StopInstance("decode-0"))
    eventually(lambda: instances(server) in ({"prefill-0"}, {"prefill-0", "decode-0~1"}), "it is gone, or replaced")
    check_answers(server, seed=4)


@pytest.mark.parametrize("obstacle", ["decode-1", "decode-1.pool"])
def test_a_cluster_goes_on_without_an_instance_that_cannot_be_added(server: Server, obstacle: str) -> None:
    (server.run_folder() / obstacle).mkdir()
    server.tell_launcher(StartInstance(Role.DECODE))
    server.wait_for_line(re.compile("decode-1 could not be added: "))
    check_answers(server, seed=5)
    server.tell_launcher(StartInstance(Role.PREFILL))
    server.wait_for_line(re.compile("added prefill-1"))
    eventually(lambda: instances(server) == {"prefill-0", "prefill-1", "decode-0"}, "the next one is there")
    check_answers(server, seed=6)


def test_top_shows_every_instance_once(server: Server) -> None:
    complete(server, {"prompt": "hello", "max_tokens": 20})
    command = [sys.executable, "-m", "flowkv.cli", "top", server.url, "--once", "--interval", "0.3"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "2 instances" in shown and "regime" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(("prefill-", "decode-"))]
    assert sorted(row[:2] for row in rows) == [["decode-0", "decode"], ["prefill-0", "prefill"]]


def long_requests(count: int) -> dict[str, dict[str, Any]]:
    rng = random.Random(count)
    return {
        f"r{i}": {"prompt": [rng.randrange(256) for _ in range(3000)], "max_tokens": 20, "temperature": 0.0}
        for i in range(count)
    }


@contextmanager
def clients(server: Server, count: int, requests: dict[str, dict[str, Any]]) -> Iterator[None]:
    """So many ask one after another to the end of the block, and get the right answers."""
    expected = toy_tokens(requests)
    turns, is_over = itertools.cycle(requests), threading.Event()
    lock = threading.Lock()

    def ask() -> None:
        while not is_over.is_set():
            with lock:
                name = next(turns)
            assert complete(server, requests[name]) == expected[name]

    with ThreadPoolExecutor(count) as pool:
        asking = [pool.submit(ask) for _ in range(count)]
        try:
            yield
        finally:
            is_over.set()
    for future in asking:
        future.result()


def test_a_cluster_grows_under_load_and_shrinks_after_it_and_every_request_is_answered() -> None:
    bounds = ("--min-instances", "2", "--max-instances", "3")
    slow = ("--set", "toy_step_s=0.02")  # so that a few clients are too many
    with serving(*TOY, *HASTY, *slow, *bounds, "--prefill", "1", "--decode", "1") as server:
        server.connect_anew(max_connections=200)
        with clients(server, 30, long_requests(8)):
            server.wait_for_line(re.compile("added "))
            eventually(lambda: len(instances(server)) == 3, "it is known")
        with clients(server, 2, make_requests(8, seed=7)):
            server.wait_for_line(re.compile("retired "))
            eventually(lambda: len(instances(server)) == 2, "it is forgotten")
        check_answers(server, seed=8)
        check_all_free(server)
        assert not any("starting it again" in line for line in server.lines)


def test_what_would_come_too_late_is_refused_at_once_with_a_time_to_come_back() -> None:
    promise = ("--slo-ttft", "1", "--admission")
    with serving(*TOY, *promise, "--prefill", "1", "--decode", "1") as server:
        server.connect_anew(max_connections=200)
        requests = long_requests(8)
        expected = toy_tokens(requests)
        names = list(itertools.islice(itertools.cycle(requests), 200))
        for name in names[:4]:  # it knows itself by then
            assert complete(server, requests[name]) == expected[name]

        def ask(name: str) -> httpx.Response:
            return server.client.post("/v1/completions", json=requests[name])

        with ThreadPoolExecutor(100) as pool:
            responses = dict(enumerate(pool.map(ask, names)))
        refused = [response for response in responses.values() if response.status_code == 429]
        assert 0 < len(refused) < len(names)
        for i, response in responses.items():
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["type"] == "rate_limit_error"
            else:
                assert response.json()["choices"][0]["text"] == expected[names[i]][0]
        # What was asked again before the answer came is counted again.
        eventually(lambda: server.client.get("/cluster").json()["num_refused"] >= len(refused), "all are counted")
        check_all_free(server)
        assert ask(names[0]).status_code == 200
