"""Every instance of a real cluster is replaced while it serves: nothing is lost, nothing changes."""

import itertools
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from flowkv.types import Role
from tests.e2e.server import Server, eventually, serving
from tests.e2e.test_toy_cluster import TOY, check_all_free, complete, make_requests, toy_tokens

SLOW_STEPS = ("--set", "toy_step_s=0.005")


@contextmanager
def load(server: Server, count: int) -> Iterator[list[int]]:
    """So many clients ask one request after another, and get the right answers; how many they got."""
    requests = make_requests(24, seed=count)
    expected = toy_tokens(requests)
    turns, is_over, answered = itertools.cycle(requests), threading.Event(), list[int]()
    lock = threading.Lock()

    def ask() -> None:
        while not is_over.is_set():
            with lock:
                name = next(turns)
            assert complete(server, requests[name]) == expected[name]
            answered.append(1)

    with ThreadPoolExecutor(count) as pool:
        asking = [pool.submit(ask) for _ in range(count)]
        try:
            yield answered
        finally:
            is_over.set()
    for future in asking:
        future.result()


def restart(server: Server, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flowkv.cli", "restart", server.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def instances(server: Server) -> set[str]:
    return set(server.gauge("flowkv_instance_blocks_total"))


def test_every_instance_is_replaced_under_load_and_no_request_fails() -> None:
    with serving(*TOY, *SLOW_STEPS, "--prefill", "1", "--decode", "1") as server:
        with load(server, 6) as answered:
            eventually(lambda: len(answered) > 10, "the load is there")
            done = restart(server)
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1] == "done: 2 restarted"
            count = len(answered)
            eventually(lambda: len(answered) > count + 10, "it goes on")
        assert instances(server) == {"prefill-0~1", "decode-0~1"}
        assert not any("without progress" in line or "SIGKILL" in line for line in server.lines)
        check_all_free(server)


def test_one_that_is_named_and_one_that_is_not_there() -> None:
    with serving(*TOY, "--prefill", "1", "--decode", "1") as server:
        assert restart(server, "--instance", "decode-0").returncode == 0
        assert instances(server) == {"prefill-0", "decode-0~1"}
        refused = restart(server, "--instance", "decode-0")
        assert refused.returncode == 1
        assert "there is no instance 'decode-0'; there are " in refused.stderr
        server.wait_for_line(re.compile("decode-0 was drained; starting it again"))


def test_roles_are_flipped_by_hand_under_load() -> None:
    with serving(*TOY, *SLOW_STEPS, "--roles", "fixed", "--prefill", "1", "--decode", "1") as server:
        with load(server, 6) as answered:
            for role in (Role.DECODE, Role.MIXED, Role.PREFILL):
                count = len(answered)
                assert server.client.post("/admin/flip", params={"instance": "prefill-0", "role": role}).is_success
                eventually(lambda role=role: roles(server)["prefill-0"] == role, "it has flipped")  # type: ignore[misc]
                eventually(lambda count=count: len(answered) > count + 5, "requests are answered")  # type: ignore[misc]
        check_all_free(server)


def roles(server: Server) -> dict[str, str]:
    return {instance["name"]: instance["role"] for instance in server.client.get("/cluster").json()["instances"]}
