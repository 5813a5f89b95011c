"""Requests of one size at a Poisson rate, sent whether the server keeps up or not; and what it can take of them."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.client import Answer, Client

CONCURRENCY = 64  # of the run that finds the capacity
TOY_VOCAB = 256


@dataclass(frozen=True)
class Shape:
    """Tokens of each request."""

    num_prompt: int
    num_output: int

    def body(self, rng: random.Random) -> dict[str, object]:
        prompt_ids = [rng.randrange(TOY_VOCAB) for _ in range(self.num_prompt)]
        return {"prompt": prompt_ids, "max_tokens": self.num_output, "temperature": 0.0, "ignore_eos": True}


def bodies(client: Client, shape: Shape, count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [client.encode("/v1/completions", shape.body(rng)) for _ in range(count)]


def poisson_s(rate: float, duration_s: float, seed: int) -> list[float]:
    """Times of arrival from 0 on, before `duration_s`."""
    rng, arrivals_s = random.Random(seed), list[float]()
    now_s = rng.expovariate(rate)
    while now_s < duration_s:
        arrivals_s.append(now_s)
        now_s += rng.expovariate(rate)
    return arrivals_s


async def arrive(client: Client, requests: Sequence[bytes], arrivals_s: Sequence[float]) -> list[Answer]:
    """Each request at its time, in order; every answer, once all are in."""
    start_s = time.perf_counter()
    sent: list[asyncio.Task[Answer]] = []
    for request, arrival_s in zip(requests, arrivals_s, strict=True):
        due_s = start_s + arrival_s
        if (wait_s := due_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        sent.append(asyncio.create_task(_send(client, request, due_s)))
    return await asyncio.gather(*sent)


async def _send(client: Client, request: bytes, due_s: float) -> Answer:
    answer = await client.send(request)
    answer.late_s = answer.sent_s - due_s
    return answer


async def capacity(client: Client, shape: Shape, duration_s: float, seed: int) -> float:
    """Requests a second that are answered while `CONCURRENCY` clients ask without a pause."""
    rng = random.Random(seed)
    begun_s = time.perf_counter()

    async def work() -> int:
        num_answered = 0
        while time.perf_counter() - begun_s < duration_s:
            answer = await client.send(client.encode("/v1/completions", shape.body(rng)))
            num_answered += answer.error is None
        return num_answered

    answered = await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return sum(answered) / (time.perf_counter() - begun_s)
