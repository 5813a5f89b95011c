"""A cluster on two nodes, which are two network namespaces: KV goes over NIXL and TCP."""

import importlib.util
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from flowkv.auth import KEY_VARIABLE, new_key
from flowkv.bundled import MODEL_FOLDER
from tests.e2e.namespaces import Namespace, two_namespaces
from tests.e2e.server import Launched, Server, cleared_up, eventually, pause, serving
from tests.e2e.test_toy_cluster import CHECKED, check_all_free, complete, make_requests, server_roles, toy_tokens

if importlib.util.find_spec("nixl") is None:
    pytest.skip("NIXL is not installed (pip install 'flowkv[nixl]')", allow_module_level=True)

KEY = new_key()
ENVIRONMENT = {KEY_VARIABLE: KEY, "UCX_TLS": "tcp,self"}
FAST = ("--set", "transfer.lease_s=1", "--set", "network.node_timeout_s=3")
SLOW_STEPS = ("--set", "toy_step_s=0.02")
JOINED = re.compile(r"joined \S+ as (\S+): (.*);")


class Nodes:
    """Where each of the two is, and how to start a launcher there."""

    def __init__(self, here: Namespace, there: Namespace) -> None:
        self.here = here
        self.there = there

    def serving(self, *arguments: str) -> AbstractContextManager[Server]:
        listen = ("--listen", self.here.address, *arguments)
        return serving(*listen, prefix=self.here.prefix, environment=ENVIRONMENT)

    def join(self, *arguments: str, ready: "re.Pattern[str]" = JOINED, key: str = KEY) -> Launched:
        command = ("join", self.here.address, *arguments)
        return Launched(command, ready, self.there.prefix, ENVIRONMENT | {KEY_VARIABLE: key})

    def joined(self, *arguments: str) -> AbstractContextManager[Launched]:
        return cleared_up(self.join(*arguments))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_namespaces() as (here, there), here.entered():
        yield Nodes(here, there)


def test_greedy_tokens_are_those_of_one_instance(nodes: Nodes) -> None:
    requests = make_requests(24, seed=5)
    with nodes.serving(*CHECKED, "--decode", "0") as server, nodes.joined("--role", "decode") as other:
        server.wait_for_line(re.compile(r"prefill-0 -> decode-0@node-1  nixl"))
        other.wait_for_line(re.compile(r"decode-0@node-1 -> prefill-0  nixl"))
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: complete(server, body), requests.values()))
        assert answers == list(toy_tokens(requests).values())
        check_all_free(server)
        assert server.gauge("flowkv_instance_transfers_total")["prefill-0"] > 0
        link = r'flowkv_link_bytes_total{backend="nixl",instance="prefill-0",peer="decode-0@node-1"} (\S+)'
        found = re.search(link, server.client.get("/metrics").text)
        assert found is not None and float(found[1]) > 0
        shown = [Path(f"/proc/{pid}/cmdline").read_text() for pid in server.processes() + other.processes()]
        assert KEY not in "".join(shown + server.lines + other.lines)


def test_an_instance_killed_on_the_other_node_is_started_again(nodes: Nodes) -> None:
    with nodes.serving(*CHECKED, *SLOW_STEPS, "--decode", "0") as server, nodes.joined("--role", "decode") as other:
        with held_by(server, "decode-0@node-1") as outcome:
            os.kill(other.pid_of("decode-0@node-1"), signal.SIGKILL)
            assert "error" not in outcome.result(60.0) and outcome.result().count('"finish_reason":"length"') == 1
        other.wait_for_line(re.compile("decode-0@node-1~1: ready"))
        check_serves(server, "decode-0@node-1~1")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_node_that_leaves_finishes_what_it_has_and_the_rest_goes_on(nodes: Nodes, signum: signal.Signals) -> None:
    with nodes.serving(*CHECKED, *SLOW_STEPS, "--decode", "0") as server:
        with nodes.joined("--role", "decode") as other, held_by(server, "decode-0@node-1") as outcome:
            assert other.stop(signum) == 0
            assert any("draining: 1 instance, at most 30 s" in line for line in other.lines)
            assert any("retired decode-0@node-1" in line for line in other.lines)
            assert "error" not in outcome.result(60.0) and outcome.result().count('"finish_reason":"length"') == 1
        server.wait_for_line(re.compile("node-1 .* is gone"))
        check_serves(server, "prefill-0")
        with nodes.joined("--role", "decode"):
            check_serves(server, "decode-0@node-2")


def test_a_node_does_not_wait_for_what_takes_too_long(nodes: Nodes) -> None:
    patience = ("--set", "server.drain_timeout_s=0.5")
    with nodes.serving(*CHECKED, *SLOW_STEPS, *patience, "--decode", "0") as server:
        with nodes.joined("--role", "decode") as other, held_by(server, "decode-0@node-1") as outcome:
            assert other.stop() == 0
            assert "error" not in outcome.result(60.0)  # it goes on elsewhere
        check_serves(server, "prefill-0")


def test_a_joined_node_stays_when_the_controller_is_killed_and_started_again(nodes: Nodes) -> None:
    with nodes.serving(*CHECKED, *SLOW_STEPS, "--decode", "0") as server, nodes.joined("--role", "decode") as other:
        with held_by(server, "decode-0@node-1") as outcome:
            os.kill(server.pid_of("controller"), signal.SIGKILL)
            server.wait_for_line(re.compile("controller~1: ready"))
            assert "error" not in outcome.result(60.0)
        check_serves(server, "decode-0@node-1")
        os.kill(other.pid_of("decode-0@node-1"), signal.SIGKILL)
        other.wait_for_line(re.compile("decode-0@node-1~1: ready"))
        with nodes.joined("--role", "decode"):  # a name that no node had under the controller before this one
            check_serves(server, "decode-0@node-1.1")


def test_a_launcher_killed_on_the_other_node_takes_its_instances_along(nodes: Nodes) -> None:
    with nodes.serving(*CHECKED, *SLOW_STEPS, *FAST, "--decode", "0") as server:
        with nodes.joined("--role", "decode") as other, held_by(server, "decode-0@node-1") as outcome:
            other.process.send_signal(signal.SIGKILL)
            other.wait()
            eventually(lambda: other.processes() == [] and other.files() == [], "nothing of it is left")
            assert "error" not in outcome.result(60.0) and outcome.result().count('"finish_reason":"length"') == 1
        server.wait_for_line(re.compile("node-1 .* is silent"))
        check_serves(server, "prefill-0")
        with nodes.joined("--role", "decode"):
            server.wait_for_line(re.compile("instance decode-0@node-1 is gone: its launcher is dead"))
            check_serves(server, "decode-0@node-2")


def test_a_stopped_instance_is_not_taken_for_dead_when_its_node_joins_again(nodes: Nodes) -> None:
    with nodes.serving(*CHECKED, *FAST, "--decode", "0") as server, nodes.joined("--role", "decode") as other:
        stopped = other.pid_of("decode-0@node-1")
        pause(stopped)
        try:
            other.process.send_signal(signal.SIGKILL)
            other.process.wait(30.0)
            with nodes.joined("--role", "decode"):
                check_serves(server, "decode-0@node-2")
                assert not any("decode-0@node-1 is gone" in line for line in server.lines)
        finally:
            os.kill(stopped, signal.SIGCONT)
        eventually(lambda: other.processes() == [] and other.files() == [], "it dies as soon as it wakes")


def test_a_node_that_hears_nothing_of_the_controller_stops(nodes: Nodes) -> None:
    with nodes.serving(*CHECKED, *FAST, "--decode", "0") as server, nodes.joined("--role", "decode") as other:
        nodes.there.set_link("down")
        try:
            assert other.wait() == 1
        finally:
            nodes.there.set_link("up")
        assert "nothing was heard of the controller for 3 s" in other.lines[-1]
        server.wait_for_line(re.compile("node-1 .* is silent"))
        check_serves(server, "prefill-0")


def test_nodes_stop_with_the_cluster(nodes: Nodes) -> None:
    with nodes.serving(*CHECKED, "--mixed", "1") as server, nodes.joined("--role", "mixed", "--count", "2") as other:
        assert "mixed-0@node-1, mixed-1@node-1" in other.lines[-1]
        assert server.stop() == 0
        assert other.wait() == 1
        assert other.lines[-1] == "flowkv: error: the cluster has stopped\n"


def test_a_node_may_come_before_the_cluster(nodes: Nodes) -> None:
    early = nodes.join("--role", "decode", ready=re.compile("asking"))
    with cleared_up(early) as other, nodes.serving(*CHECKED, "--decode", "0") as server:
        other.wait_for_line(JOINED)
        check_serves(server, "decode-0@node-1")


def test_another_key_lets_nobody_in(nodes: Nodes) -> None:
    with nodes.serving(*CHECKED, "--mixed", "1") as server:
        mistaken = nodes.join("--role", "mixed", "--timeout", "3", key=new_key(), ready=re.compile("error"))
        with cleared_up(mistaken) as other:
            assert other.wait() == 1
        assert "its cluster key is another" in other.lines[-1]
        refused = [line for line in server.lines if "turned away" in line]
        assert len(refused) == 1
        assert server_roles(server) == {"mixed-0"}


@pytest.mark.slow  # toys: test_greedy_tokens_are_those_of_one_instance; who is refused: tests/cluster/test_admission
def test_the_bundled_model_answers_the_same_through_two_nodes_and_no_other_model_gets_in(
    nodes: Nodes, tmp_path: Path
) -> None:
    options = ("--threads", "1", "--dtype", "float32", "--set", "engine.max_batch_tokens=128")
    rng = random.Random(1)
    bodies = [
        {"prompt": [rng.randrange(5, 1500) for _ in range(length)], "max_tokens": 24, "temperature": 0}
        for length in (1, 17, 300)
    ]
    with nodes.serving(*options, "--decode", "0", "--roles", "fixed") as server:
        alone = [complete(server, body) for body in bodies]  # no decode instance yet
        other_weights = str(other_model(tmp_path / MODEL_FOLDER.name))
        with cleared_up(nodes.join(other_weights, "--role", "decode", ready=re.compile("error"))) as refused:
            assert refused.wait() == 1
        assert "decode-0@node-1: it serves other weights under the name" in refused.lines[-1]
        with nodes.joined("--role", "decode", "--threads", "1"):
            eventually(lambda: "decode-0@node-2" in server_roles(server), "it is known")
            assert [complete(server, body) for body in bodies] == alone
            eventually(
                lambda: server.gauge("flowkv_instance_transfers_total")["prefill-0"] == len(bodies), "all handed over"
            )


def other_model(folder: Path) -> Path:
    """The bundled one, but for one weight."""
    shutil.copytree(MODEL_FOLDER, folder)
    weights = next(folder.glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[8 + int.from_bytes(changed[:8], "little")] ^= 1
    weights.write_bytes(changed)
    return folder


def check_serves(server: Server, instance: str) -> None:
    """The cluster knows the instance, and answers as it should."""
    eventually(lambda: instance in server_roles(server), f"{instance} is known")
    body = {"prompt": [7] * 50, "max_tokens": 20, "temperature": 0.0}
    assert complete(server, body) == toy_tokens({"r": body})["r"]


@contextmanager
def held_by(server: Server, instance: str) -> "Iterator[Future[str]]":
    """A long request that this instance decodes; what its client gets in the end."""
    eventually(lambda: instance in server_roles(server), f"{instance} is known")
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(stream, server)
        eventually(lambda: server.gauge("flowkv_instance_decoding")[instance] == 1.0, f"{instance} holds the request")
        yield outcome


def stream(server: Server) -> str:
    body: dict[str, Any] = {"prompt": "hello", "max_tokens": 150, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        return response.read().decode()
