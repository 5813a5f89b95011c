"""Real processes over ToyRunner, whose tokens are a checksum of the KV cache: exact, and quick."""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from flowkv.config import EngineConfig
from flowkv.types import Role
from tests.cluster_in_process import Cluster
from tests.e2e.server import Server, eventually, pause, serving

TOY = ("--toy", "--set", "engine.check_integrity=true")
CHECKED = (*TOY, "--roles", "fixed")  # every prompt crosses from a prefill to a decode instance
SMALL = ("--set", "engine.max_batch_tokens=64", "--kv-memory", "48KiB")  # 1,024 tokens a pool: blocks do run out


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(*CHECKED, *SMALL, "--prefill", "1", "--decode", "1") as server:
        yield server


def toy_tokens(requests: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What one large mixed instance in this process answers, as text, by request and choice."""
    cluster = Cluster([Role.MIXED], num_blocks=4096, config=EngineConfig())
    for name, body in requests.items():
        sampling = {key: body[key] for key in ("max_tokens", "temperature", "seed", "n") if key in body}
        cluster.submit(name, body["prompt"], **sampling)
    cluster.run()
    return {
        name: [bytes(cluster.ids(name, choice)).decode() for choice in range(body.get("n", 1))]
        for name, body in requests.items()
    }


def make_requests(count: int, seed: int) -> dict[str, dict[str, Any]]:
    rng = random.Random(seed)
    requests = {}
    for i in range(count):
        requests[f"r{i}"] = {
            "prompt": [rng.randrange(256) for _ in range(rng.choice([1, 2, 15, 16, 17, 64, 100, 300]))],
            "max_tokens": rng.choice([1, 2, 17, 60]),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": i,
            "n": rng.choice([1, 1, 1, 3]),
        }
    return requests


def complete(server: Server, body: dict[str, Any]) -> list[str]:
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    return [choice["text"] for choice in choices]


def check_all_free(server: Server) -> None:
    eventually(lambda: set(server.gauge("flowkv_instance_blocks_used").values()) == {0.0}, "every block is free")


def test_64_requests_at_once_give_exactly_the_tokens_of_one_instance(server: Server) -> None:
    requests = make_requests(64, seed=1)
    expected = toy_tokens(requests)
    with ThreadPoolExecutor(64) as pool:
        answers = dict(zip(requests, pool.map(lambda body: complete(server, body), requests.values()), strict=True))
    assert answers == expected
    eventually(lambda: server.gauge("flowkv_instance_transfers_total")["prefill-0"] > 0, "the news of it is out")
    check_all_free(server)


def test_200_aborts_at_random_moments_leave_no_block_behind(server: Server) -> None:
    requests = list(make_requests(200, seed=2).values())

    def abort_soon(i: int) -> None:
        rng = random.Random(i)
        body = requests[i] | {"max_tokens": 200, "stream": True}
        num_lines = rng.choice([0, 0, 1, 2, 5, 20])
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            for line_number, _ in enumerate(response.iter_lines()):
                if line_number >= num_lines:
                    return

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(abort_soon, range(200)))
    check_all_free(server)
    probe = {"p": requests[0] | {"max_tokens": 20}}
    assert complete(server, probe["p"]) == toy_tokens(probe)["p"]


def test_flexible_roles_and_an_slo_answer_the_same() -> None:
    requests = make_requests(96, seed=4)
    quick = ("--set", "scheduling.dwell_s=0.1", "--set", "scheduling.interval_s=0.05", "--set", "toy_step_s=0.002")
    with serving(*TOY, *quick, "--prefill", "1", "--decode", "2", "--slo-ttft", "0.5", "--slo-tpot", "0.01") as server:
        with ThreadPoolExecutor(48) as pool:
            answers = dict(zip(requests, pool.map(lambda body: complete(server, body), requests.values()), strict=True))
        assert answers == toy_tokens(requests)
        check_all_free(server)
        tokens = server.gauge("flowkv_instance_prefill_tokens_total")
        assert sum(count > 0 for count in tokens.values()) > 1, "more than one instance computes prompts under load"


def test_a_mixed_instance_answers_the_same() -> None:
    requests = make_requests(8, seed=3)
    with serving(*CHECKED, "--mixed", "1") as mixed:
        answers = {name: complete(mixed, body) for name, body in requests.items()}
        assert server_roles(mixed) == {"mixed-0"}
    assert answers == toy_tokens(requests)


def server_roles(server: Server) -> set[str]:
    return set(server.gauge("flowkv_instance_blocks_total"))


def test_two_clusters_run_side_by_side() -> None:
    body = make_requests(1, seed=4)["r0"] | {"max_tokens": 30}
    with serving(*CHECKED) as one, serving(*CHECKED, "--prefill", "2", "--decode", "2") as two:
        assert one.url != two.url
        assert complete(one, body) == complete(two, body) == toy_tokens({"r": body})["r"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_and_open_streams_hear_of_it(signum: signal.Signals) -> None:
    with serving(*CHECKED, "--set", "toy_step_s=0.02", "--set", "server.drain_timeout_s=0.2") as server:
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            body = {"prompt": "hello", "max_tokens": 5000, "stream": True}
            with server.client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(30.0)
        assert server.stop(signum) == 0
        reader.join(30.0)
        assert not reader.is_alive()
    assert "error" in lines[-1] or '"abort"' in "".join(lines) or lines[-2:] == ["data: [DONE]", ""]


def test_signals_to_the_whole_group_end_everything_too() -> None:
    """As supervisors and closing terminals send them, and impatient people."""
    with serving(*CHECKED) as server:
        os.killpg(server.process.pid, signal.SIGTERM)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert server.wait() == 0


def test_a_signal_while_a_breakdown_is_cleared_up_leaves_nothing_behind() -> None:
    with serving(*CHECKED, "--set", "restart.max_failures=0") as server:
        controller, frontend = server.pid_of("controller"), server.pid_of("frontend")
        pause(frontend)  # the launcher waits for its end before it ends the others
        os.kill(controller, signal.SIGKILL)
        eventually(lambda: controller not in server.processes(), "there is no cluster without it")
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        os.kill(frontend, signal.SIGCONT)
        assert server.wait() == 1
        assert "the controller was killed by SIGKILL" in server.lines[-1]


def test_killing_the_launcher_leaves_no_process_and_no_memory_behind() -> None:
    with serving(*CHECKED) as server:
        assert len(server.processes()) >= 5
        server.process.send_signal(signal.SIGKILL)
        server.wait()
        eventually(lambda: server.processes() == [], "every process is gone")
        eventually(lambda: server.files() == [], "the run folder is gone")


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_killed_instance_is_started_again_and_its_requests_go_on(victim: str) -> None:
    with serving(*CHECKED, "--set", "toy_step_s=0.02", "--set", "engine.max_batch_tokens=16") as server:
        outcome: list[str] = []
        begun = threading.Event()

        def read() -> None:
            body = {"prompt": "x" * (3000 if victim == "prefill-0" else 5), "max_tokens": 100, "stream": True}
            begun.set()
            with server.client.stream("POST", "/v1/completions", json=body) as response:
                outcome.append(response.read().decode())

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(30.0)
        gauge = "flowkv_instance_prefilling" if victim == "prefill-0" else "flowkv_instance_decoding"
        eventually(lambda: server.gauge(gauge)[victim] == 1.0, f"{victim} holds the request")
        num_lines = len(server.lines)
        os.kill(server.pid_of(victim), signal.SIGKILL)
        reader.join(30.0)
        assert not reader.is_alive()
        assert "error" not in outcome[0] and outcome[0].count('"finish_reason":"length"') == 1
        server.wait_for_line(re.compile(f"{victim}~1: ready"), after=num_lines)
        eventually(lambda: f"{victim}~1" in server_roles(server), "the cluster knows the new instance")
        body = {"prompt": [7] * 50, "max_tokens": 20, "temperature": 0.0}
        assert complete(server, body) == toy_tokens({"r": body})["r"]
        check_all_free(server)


def test_bad_input_never_kills_anything_and_always_gets_an_answer(server: Server) -> None:
    bodies: list[tuple[bytes | dict[str, Any], int, str]] = [
        (b"{not json", 400, ""),
        (b"", 400, ""),
        (b"[" * 100_000, 400, ""),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "x", "model": "nobody"}, 404, "nobody"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        (b'{"prompt": "x", "temperature": NaN}', 400, ""),
        (b'{"prompt": "x", "temperature": 1e999}', 400, ""),
        ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": 9000}, 400, "1024"),
        ({"prompt": "x" * 1000, "max_tokens": 500}, 400, "1024"),
        ({"prompt": "x" * 1500}, 400, "1024"),
        ({"prompt": [1, 2, 300]}, 400, "300"),
        (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413, ""),
    ]
    for body, status, word in bodies:
        content = body if isinstance(body, bytes) else httpx.Request("POST", "http://x", json=body).content
        response = server.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == status, (body if len(str(body)) < 200 else status, response.text)
        assert word in response.json()["error"]["message"], response.text
    check_all_free(server)
    assert complete(server, {"prompt": "x", "max_tokens": 3})[0]
