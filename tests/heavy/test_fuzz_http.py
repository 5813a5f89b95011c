"""Mutated bodies over every route: an answer each, none of them the server's fault, and nothing left of them."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from benchmarks.chaos.havoc import Chaos
from flowkv.grammar.sandbox import MAX_GROWN_BYTES
from tests.e2e.server import Server
from tests.e2e.test_toy_cluster import toy_tokens
from tests.heavy.bodies import BODIES, field_names
from tests.heavy.leftovers import leaving_nothing
from tests.heavy.mutate import mutated_body

TIMEOUT_S = 60.0
PAGE_BYTES = 4096
CONCURRENCY = 8
WARMUP_FRACTION = 0.3  # of a run, after which memory is compared
# Caches fill up (grammars that are known, pieces of tokens, requests that are shown); a third of a kilobyte left of
# each body would be more.
SLACK_BYTES, GROWTH_FRACTION = 8 << 20, 0.05


@dataclass
class Fuzz:
    """Sends `count` bodies that `seed` makes; `faults` are the answers that must not be."""

    server: Server
    count: int
    seed: int
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    async def run(self, first: int = 0) -> None:
        numbers = iter(range(first, first + self.count))
        async with (
            httpx.AsyncClient(base_url=self.server.url, timeout=TIMEOUT_S) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(CONCURRENCY):
                group.create_task(self._work(client, numbers))

    async def _work(self, client: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            path, body = self._body(number)
            try:
                answer = await client.post(path, content=body, headers={"content-type": "application/json"})
                self._judge(number, path, body, answer)
            except httpx.HTTPError as error:
                self.faults.append(f"{self.seed}-{number} {path} {body[:300]!r}: {error!r}")

    def _body(self, number: int) -> tuple[str, bytes]:
        rng = random.Random(f"{self.seed}-{number}")
        path = rng.choice(sorted(BODIES))
        return path, mutated_body(rng.choice(BODIES[path]), rng, field_names())

    def _judge(self, number: int, path: str, body: bytes, answer: httpx.Response) -> None:
        self.statuses[answer.status_code] += 1
        if (reason := fault(answer)) is not None:
            self.faults.append(f"{self.seed}-{number} {path} {body[:300]!r}: {reason}: {answer.text[:300]}")


def fault(answer: httpx.Response) -> str | None:
    """What the server did wrong, if anything."""
    status = answer.status_code
    if status == 503:
        return None if "retry-after" in answer.headers else "503 without Retry-After"
    if status >= 500:
        return f"status {status}"
    if status >= 400:
        error = answer.json().get("error") if answer.headers.get("content-type") == "application/json" else None
        return None if error and error["message"] and error["type"] else f"a {status} that does not say why"
    is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    return "an error in the midst of a stream" if is_stream and '"server_error"' in answer.text else None


def resident_bytes(server: Server) -> dict[str, int]:
    """Of each process, by name and id."""
    names = Chaos(server, 0).names()
    return {f"{name} {pid}": _resident_pages(pid) * PAGE_BYTES for pid, name in names.items()}


def largest_bytes(name: str, before: int) -> int:
    """What a process may have at the end. One that compiles grammars is ended when it has grown."""
    growth = SLACK_BYTES + int(GROWTH_FRACTION * before)
    return before + (max(growth, MAX_GROWN_BYTES) if name.startswith("python") else growth)


def _resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


@pytest.mark.parametrize(("count", "seed"), [(600, 1), pytest.param(50_000, 2, marks=pytest.mark.slow)])
def test_mutated_bodies(count: int, seed: int) -> None:
    warmup = int(count * WARMUP_FRACTION)
    with leaving_nothing("--toy", "--set", "engine.check_integrity=true", "--kv-memory", "48KiB") as server:
        pids = Chaos(server, 0).names()
        first, second = Fuzz(server, warmup, seed), Fuzz(server, count - warmup, seed)
        asyncio.run(first.run())
        before = resident_bytes(server)
        asyncio.run(second.run(warmup))
        print(f"seed {seed}: {first.statuses + second.statuses}")
        assert first.faults + second.faults == []
        assert {200, 400} <= set(second.statuses), "both kinds are tried"
        assert pids.items() <= Chaos(server, 0).names().items(), "no process has ended; where grammars compile is new"
        after = resident_bytes(server)
        assert {name: size for name, size in after.items() if size > largest_bytes(name, before.get(name, size))} == {}
        body = {"prompt": [7] * 50, "max_tokens": 20, "temperature": 0.0}
        answer = server.client.post("/v1/completions", json=body).json()
        assert [choice["text"] for choice in answer["choices"]] == toy_tokens({"r": body})["r"]
