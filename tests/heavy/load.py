"""A steady load of streams whose every event is compared with what the undisturbed run said."""

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.server import Server
from tests.e2e.test_toy_cluster import toy_tokens

TIMEOUT_S = 120.0  # of one request: far above what any takes, so that whoever reaches it hangs


@dataclass(frozen=True)
class Ask:
    """A body for `path`, and the text of each of its choices."""

    path: str
    body: dict[str, Any]
    texts: list[str]


@dataclass
class Outcome:
    """What a client has seen of one request; `problem` is None where all is as it should be."""

    ask: Ask
    began_s: float
    texts: list[str]
    finish_reasons: list[str | None]
    problem: str | None = None
    num_events: int = 0
    ended_s: float = 0.0

    @classmethod
    def of(cls, ask: Ask) -> "Outcome":
        return cls(ask, time.monotonic(), [""] * len(ask.texts), [None] * len(ask.texts))

    def take(self, event: dict[str, Any]) -> None:
        """One event of the stream: it must continue the text exactly where the last one ended."""
        if "error" in event:
            self._blame(f"error {event['error']}")
        for choice in event.get("choices", []):
            self._take_choice(choice)
        self.num_events += 1

    def end(self, is_done: bool) -> None:
        self.ended_s = time.monotonic()
        if not is_done:
            self._blame("the stream ended without [DONE]")
        for number, (text, expected) in enumerate(zip(self.texts, self.ask.texts, strict=True)):
            if self.finish_reasons[number] not in ("stop", "length"):
                self._blame(f"choice {number} ended with {self.finish_reasons[number]}")
            if text != expected:
                self._blame(f"choice {number} has {len(text)} of {len(expected)} characters")

    def fail(self, problem: str) -> None:
        self.ended_s = time.monotonic()
        self._blame(problem)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        number = choice["index"]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        at, expected = len(self.texts[number]), self.ask.texts[number]
        if expected[at : at + len(piece)] != piece:
            self._blame(f"choice {number} says {piece!r} at {at}, not {expected[at : at + len(piece)]!r}")
        if self.finish_reasons[number] is not None:
            self._blame(f"choice {number} goes on after its end")
        self.texts[number] += piece
        self.finish_reasons[number] = choice["finish_reason"]

    def _blame(self, problem: str) -> None:
        """The first one is the one to look at."""
        self.problem = self.problem or problem


@dataclass
class Load:
    """`concurrency` clients, each with one request after the other, chosen among `asks` by `seed`."""

    url: str
    asks: Sequence[Ask]
    concurrency: int
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> None:
        """Until `is_over` is set and every request has been answered."""
        limits = httpx.Limits(max_connections=self.concurrency)
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            for number in range(self.concurrency):
                group.create_task(self._work(client, random.Random(f"{self.seed}-{number}")))

    async def _work(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        while not self.is_over:
            outcome = Outcome.of(rng.choice(self.asks))
            self.outcomes.append(outcome)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await read(client, outcome)
            except (httpx.HTTPError, TimeoutError) as error:
                outcome.fail(f"{type(error).__name__}: {error}")

    @property
    def problems(self) -> list[str]:
        return [f"{o.problem} (after {o.num_events} events)" for o in self.outcomes if o.problem is not None]


async def read(client: httpx.AsyncClient, outcome: Outcome) -> None:
    """One request to its end."""
    ask = outcome.ask
    async with client.stream("POST", ask.path, json=ask.body | {"stream": True}) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            outcome.fail(f"status {response.status_code}: {text}")
            return
        is_done = False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                outcome.take(json.loads(line[6:]))
        outcome.end(is_done)


def toy_asks(count: int, seed: int) -> list[Ask]:
    """Greedy and seeded, one choice and three, prompts of one step and of many."""
    rng = random.Random(seed)
    bodies = {
        str(i): {
            "prompt": [rng.randrange(256) for _ in range(rng.choice([1, 16, 17, 64, 150, 300]))],
            "max_tokens": rng.choice([1, 8, 40, 90]),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": i,
            "n": rng.choice([1, 1, 1, 3]),
        }
        for i in range(count)
    }
    texts = toy_tokens(bodies)
    return [Ask("/v1/completions", body, texts[name]) for name, body in bodies.items()]


def undisturbed(server: Server, bodies: Iterator[tuple[str, dict[str, Any]]]) -> list[Ask]:
    """What this server answers to each while nothing happens to it."""
    return [Ask(path, body, _texts(server, path, body)) for path, body in bodies]


def _texts(server: Server, path: str, body: dict[str, Any]) -> list[str]:
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    choices = sorted(answer.json()["choices"], key=lambda choice: int(choice["index"]))
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
