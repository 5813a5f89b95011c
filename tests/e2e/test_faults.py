"""Real processes, killed and stopped while requests are on their way: everyone is answered, no block is lost."""

import contextlib
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server, eventually, pause, serving
from tests.e2e.test_toy_cluster import CHECKED, toy_tokens

LEASE_S = 0.5
# Prompts take many steps, and pools (1,024 tokens) are small enough that blocks are in use again soon.
SLOW = ("--set", "toy_step_s=0.01", "--set", "engine.max_batch_tokens=16", "--kv-memory", "48KiB")
PATIENT = ("--set", "restart.hung=false")  # whoever is stopped is woken by the test, and may be late in that
OPTIONS = (*CHECKED, *SLOW, *PATIENT, "--set", f"transfer.lease_s={LEASE_S}")


@dataclass(frozen=True)
class Outcome:
    """What a client has seen of one stream, to its end."""

    text: str
    finish_reason: str | None
    error: str | None


class Streams:
    """Requests whose answers are being read, each by a thread."""

    def __init__(self, server: Server, count: int, seed: int) -> None:
        self._server = server
        self._count = count
        self._random = random.Random(seed)
        self._pool = ThreadPoolExecutor(count)
        self._bodies: list[dict[str, Any]] = []
        self._outcomes: list[Future[Outcome]] = []
        for _ in range(count):
            self._start_one()

    def reach(self, has_come: Callable[[Server], bool], what: str) -> None:
        """Keep as many under way until a moment that the gauges, which are a little old, may miss at first."""

        def look() -> bool:
            if sum(not outcome.done() for outcome in self._outcomes) < self._count:
                self._start_one()
            return has_come(self._server)

        eventually(look, what)

    def check(self) -> list[Outcome]:
        """All end, within their time, with the right text."""
        outcomes = [future.result(60.0) for future in self._outcomes]
        self._pool.shutdown()
        expected = toy_tokens({str(i): body | {"temperature": 0.0} for i, body in enumerate(self._bodies)})
        for i, outcome in enumerate(outcomes):
            [text] = expected[str(i)]
            assert (outcome.text, outcome.finish_reason, outcome.error) == (text, "length", None)
        return outcomes

    def _start_one(self) -> None:
        prompt = [self._random.randrange(256) for _ in range(self._random.choice([40, 150, 300]))]
        body = {"prompt": prompt, "max_tokens": self._random.choice([8, 40])}
        self._bodies.append(body)
        self._outcomes.append(self._pool.submit(self._read, body))

    def _read(self, body: dict[str, Any]) -> Outcome:
        text, finish_reason, error = "", None, None
        with self._server.client.stream(
            "POST", "/v1/completions", json=body | {"temperature": 0.0, "stream": True}
        ) as response:  # fmt: skip
            for line in response.iter_lines():
                data = json.loads(line.removeprefix("data: ")) if line not in ("", "data: [DONE]") else {}
                if "error" in data:
                    error = data["error"]["code"]
                for choice in data.get("choices", []):
                    text += choice["text"]
                    finish_reason = choice["finish_reason"] or finish_reason
        assert finish_reason is not None or error is not None, "a stream ended without a word"
        return Outcome(text, finish_reason, error)


def value(server: Server, gauge: str, name: str) -> float:
    """Of the instance, or of the one that took its place."""
    return sum(v for instance, v in server.gauge(f"flowkv_instance_{gauge}").items() if instance.split("~")[0] == name)


def living(server: Server, seat: str) -> str | None:
    """The present name of an instance that may have been started again."""
    names = [name for name in server.gauge("flowkv_instance_blocks_total") if name.split("~")[0] == seat]
    return names[0] if names else None


def is_replaced(server: Server, seat: str, name: str) -> bool:
    return living(server, seat) not in (None, name)


def check_all_free(server: Server) -> None:
    for gauge in ("blocks_used", "blocks_quarantined", "stalled"):
        eventually(partial(is_zero, server, gauge), f"no {gauge}")


def is_zero(server: Server, gauge: str) -> bool:
    return set(server.gauge(f"flowkv_instance_{gauge}").values()) == {0.0}


def check_serves(server: Server, seed: int) -> None:
    assert {outcome.error for outcome in Streams(server, 6, seed).check()} == {None}


@contextmanager
def warm(*arguments: str, prefill: int = 1) -> Iterator[Server]:
    """A server whose prefill instances have all computed something."""
    with serving(*OPTIONS, "--prefill", str(prefill), *arguments) as server:
        check_serves(server, seed=0)
        for i in range(prefill):
            eventually(partial(has_computed, server, f"prefill-{i}"), f"prefill-{i} has computed something")
        yield server


def has_computed(server: Server, name: str) -> bool:
    return server.gauge("flowkv_instance_prefill_tokens_total")[name] > 0


MOMENTS: dict[str, Callable[[Server], bool]] = {
    "before its transfer": lambda server: value(server, "waiting", "prefill-0") > 0,
    "during a transfer": lambda server: value(server, "receiving", "decode-0") > 0,
    "after a transfer": lambda server: value(server, "decoding", "decode-0") > 0,
}


@pytest.mark.parametrize("seat", ["prefill-0", "decode-0"])
def test_an_instance_is_killed_under_streams(seat: str) -> None:
    with warm() as server:
        for seed, (moment, has_come) in enumerate(MOMENTS.items(), start=1):
            streams = Streams(server, 10, seed)
            streams.reach(has_come, moment)
            name = living(server, seat)
            assert name is not None
            os.kill(server.pid_of(name), signal.SIGKILL)
            streams.check()
            eventually(partial(is_replaced, server, seat, name), f"{name} is replaced")
            check_all_free(server)
            check_serves(server, seed)


def test_a_prefill_instance_is_stopped_for_longer_than_its_lease_and_woken_while_others_use_the_pools() -> None:
    with warm("--decode", "1", prefill=2) as server:
        streams = Streams(server, 12, seed=1)
        streams.reach(lambda _: value(server, "receiving", "decode-0") > 0 and busy(server, "prefill-0"), "a transfer")
        pid = server.pid_of("prefill-0")
        pause(pid)
        eventually(lambda: value(server, "stalled", "prefill-0") == 1.0, "it is stalled")
        streams.check()
        assert recoveries(server) > 0
        eventually(lambda: quarantines_all_it_uses(server, "decode-0"), "only what the stopped one may write is held")
        others = Streams(server, 12, seed=2)
        others.reach(lambda _: value(server, "decoding", "decode-0") > 1, "the pool is in use again")
        os.kill(pid, signal.SIGCONT)
        assert {outcome.error for outcome in others.check()} == {None}
        check_all_free(server)
        check_serves(server, seed=3)


def recoveries(server: Server) -> float:
    found = re.search(r"^flowkv_recoveries_total (\S+)", server.client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def busy(server: Server, name: str) -> bool:
    return value(server, "prefilling", name) > 0


def quarantines_all_it_uses(server: Server, name: str) -> bool:
    return value(server, "blocks_used", name) == value(server, "blocks_quarantined", name)


@pytest.mark.parametrize("num_decode", [1, 2])
def test_a_decode_instance_is_stopped_for_longer_than_a_lease_and_woken_while_others_are_served(
    num_decode: int,
) -> None:
    with warm("--decode", str(num_decode)) as server:
        streams = Streams(server, 12, seed=1)
        streams.reach(lambda _: value(server, "receiving", "decode-0") > 0, "a transfer")
        pid = server.pid_of("decode-0")
        pause(pid)
        streams.check()
        eventually(lambda: value(server, "stalled", "decode-0") == 1.0, "it is stalled")
        check_serves(server, seed=2)
        others = Streams(server, 12, seed=3)
        others.reach(lambda _: busy(server, "prefill-0"), "the pool is in use again")
        os.kill(pid, signal.SIGCONT)
        assert {outcome.error for outcome in others.check()} == {None}
        check_all_free(server)
        check_serves(server, seed=4)


def test_when_all_are_stopped_the_answer_comes_and_when_they_wake_it_is_the_right_one() -> None:
    with warm() as server:
        pids = [server.pid_of(name) for name in ("prefill-0", "decode-0")]
        for pid in pids:
            pause(pid)
        eventually(lambda: server.client.get("/ready").status_code == 503, "nobody is left")
        body = {"prompt": [7] * 50, "max_tokens": 5, "temperature": 0.0}
        assert server.client.post("/v1/completions", json=body).status_code == 503
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        check_all_free(server)
        check_serves(server, seed=1)


def test_clients_that_leave_while_an_instance_is_stopped_leave_no_block_behind() -> None:
    with warm("--decode", "2") as server:
        for seed, seat in enumerate(("prefill-0", "decode-0", "decode-1")):
            streams = Streams(server, 4, seed)
            pid = server.pid_of(seat)
            with ThreadPoolExecutor(8) as pool:
                gone = [pool.submit(leave_soon, server, i) for i in range(8)]
                pause(pid)
                for future in gone:
                    future.result(60.0)
            os.kill(pid, signal.SIGCONT)
            streams.check()
            check_all_free(server)
        check_serves(server, seed=9)


def leave_soon(server: Server, seed: int) -> None:
    rng = random.Random(seed)
    body = {"prompt": [rng.randrange(256) for _ in range(200)], "max_tokens": 200, "stream": True}
    with (
        contextlib.suppress(httpx.TimeoutException),
        server.client.stream("POST", "/v1/completions", json=body, timeout=rng.uniform(0.1, 1.0)) as response,
    ):
        for _ in response.iter_lines():
            if rng.random() < 0.2:
                return
