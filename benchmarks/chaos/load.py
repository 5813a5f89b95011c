"""A steady load of streams whose every event is compared with what the undisturbed run said."""

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks import BenchmarkError

Body = tuple[str, dict[str, Any]]  # the path that it goes to, and what is sent
TIMEOUT_S = 120.0  # of one request: far above what any takes, so that whoever reaches it hangs


@dataclass(frozen=True)
class Ask:
    """A body for `path`, and the text of each of its choices."""

    path: str
    body: dict[str, Any]
    texts: list[str]


@dataclass
class Outcome:
    """What a client has seen of one request, times by `time.monotonic`; `problem` is None where all is well."""

    ask: Ask
    began_s: float
    texts: list[str]
    finish_reasons: list[str | None]
    problem: str | None = None
    num_events: int = 0
    text_s: list[float] = field(default_factory=list)  # of each event that brought text
    is_whole: bool = False  # every choice came to its end, and [DONE] after them
    request_id: str = ""
    ended_s: float = 0.0

    @classmethod
    def of(cls, ask: Ask) -> "Outcome":
        return cls(ask, time.monotonic(), [""] * len(ask.texts), [None] * len(ask.texts))

    def take(self, event: dict[str, Any]) -> None:
        """One event of the stream: it must continue the text exactly where the last one ended."""
        if "error" in event:
            self._blame(f"error {event['error']}")
        self.request_id = event.get("id", self.request_id)
        texts = [self._take_choice(choice) for choice in event.get("choices", [])]
        if any(texts):
            self.text_s.append(time.monotonic())
        self.num_events += 1

    def end(self, is_done: bool) -> None:
        self.ended_s = time.monotonic()
        self.is_whole = is_done and all(reason in ("stop", "length") for reason in self.finish_reasons)
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

    def _take_choice(self, choice: dict[str, Any]) -> str:
        """The text that it brings."""
        number = choice["index"]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        at, expected = len(self.texts[number]), self.ask.texts[number]
        if expected[at : at + len(piece)] != piece:
            self._blame(f"choice {number} says {piece!r} at {at}, not {expected[at : at + len(piece)]!r}")
        if self.finish_reasons[number] is not None:
            self._blame(f"choice {number} goes on after its end")
        self.texts[number] += piece
        self.finish_reasons[number] = choice["finish_reason"]
        return str(piece)

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


async def undisturbed(url: str, bodies: Iterable[Body], concurrency: int = 1) -> list[Ask]:
    """What this server answers to each while nothing happens to it. BenchmarkError where it does not."""
    places = asyncio.Semaphore(concurrency)

    async def ask(path: str, body: dict[str, Any]) -> Ask:
        async with places:
            return Ask(path, body, await _texts(client, path, body))

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        return await asyncio.gather(*(ask(path, body) for path, body in bodies))


async def _texts(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[str]:
    answer = await client.post(path, json=body)
    if answer.status_code != 200:
        raise BenchmarkError(f"{path} answers {answer.status_code}: {answer.text}")
    choices = sorted(answer.json()["choices"], key=lambda choice: int(choice["index"]))
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
