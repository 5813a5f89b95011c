"""What is done to a server under load: processes killed, stopped and woken, by a seed."""

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks import BenchmarkError
from benchmarks.chaos.load import Load
from benchmarks.chaos.running import Running, living
from flowkv.messages import seat_of

_INSTANCE = re.compile(r"(?:prefill|decode|mixed)-\d+(?:~\d+)?")
_LOOK_S = 0.02  # between two looks for a successor
_TIMEOUT_S = 120.0


@dataclass
class Deed:
    """`at_s` by `time.monotonic`; `over_s` is when its successor was in service, or when it went on."""

    at_s: float
    what: str
    victim: str
    over_s: float | None = None

    @property
    def took_s(self) -> float | None:
        return None if self.over_s is None else self.over_s - self.at_s


@dataclass
class Chaos:
    """A server and what has been done to it; the same seed does the same at the same times."""

    server: Running
    seed: int
    deeds: list[Deed] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def instances(self) -> dict[str, int]:
        """Process ids by name, those that still start included."""
        return {name: pid for pid, name in self.names().items() if _INSTANCE.fullmatch(name)}

    def names(self) -> dict[int, str]:
        """What `ps` calls each living process of the server but the launcher."""
        return {process.pid: process.name for process in living(self.server) if process.pid != self.server.pid}

    def kill_one(self) -> Deed:
        """A random instance."""
        name, pid = self.random.choice(sorted(self.instances().items()))
        return self.signal(name, pid, signal.SIGKILL)

    async def kill_controller(self) -> None:
        """And wait for its successor."""
        [(pid, name)] = [(pid, name) for pid, name in self.names().items() if name.startswith("controller")]
        deed = self.signal(name, pid, signal.SIGKILL)
        await until(lambda: self._has_other(name, pid), "another controller")
        deed.over_s = time.monotonic()

    async def pause_one(self, seconds: float) -> None:
        """Stop a random instance so long, and wake it."""
        name, pid = self.random.choice(sorted(self.instances().items()))
        deed = self.signal(name, pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.signal(name, pid, signal.SIGCONT)
        deed.over_s = time.monotonic()

    async def see_replaced(self, deed: Deed) -> None:
        """Wait until the cluster knows a successor of the victim."""
        seat, deadline_s = seat_of(deed.victim), time.monotonic() + _TIMEOUT_S
        async with httpx.AsyncClient(base_url=self.server.url, timeout=_TIMEOUT_S) as client:
            while deed.over_s is None:
                names = {instance["name"] for instance in (await client.get("/cluster")).json()["instances"]}
                if deed.victim not in names and seat in map(seat_of, names):
                    deed.over_s = time.monotonic()
                elif time.monotonic() > deadline_s:
                    raise BenchmarkError(f"nobody has taken the place of {deed.victim} for {_TIMEOUT_S:.0f} s")
                await asyncio.sleep(_LOOK_S)

    def signal(self, name: str, pid: int, signum: signal.Signals) -> Deed:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            return self.note(f"{signum.name} (too late)", name)
        return self.note(signum.name, name)

    def note(self, what: str, victim: str) -> Deed:
        self.deeds.append(Deed(time.monotonic(), what, victim))
        return self.deeds[-1]

    def story(self) -> list[str]:
        return [f"{deed.at_s - self.began_s:6.2f} s {deed.what} {deed.victim}" for deed in self.deeds]

    def _has_other(self, name: str, pid: int) -> bool:
        return any(seat_of(other) == seat_of(name) and other_pid != pid for other_pid, other in self.names().items())


Havoc = Callable[[Chaos], Awaitable[Any]]


def killing(seconds: float, every_s: float) -> Havoc:
    """A random instance every so often, one that has just been started too, and in the midst of it the controller."""

    async def havoc(chaos: Chaos) -> None:
        num_kills = max(1, int(seconds // every_s))
        async with asyncio.TaskGroup() as group:
            for number in range(num_kills):
                await asyncio.sleep(every_s)
                group.create_task(chaos.see_replaced(chaos.kill_one()))
                if number == num_kills // 2:
                    await asyncio.sleep(every_s / 2)  # some of the time alone, some of it with an instance that is down
                    await chaos.kill_controller()

    return havoc


def killing_in_turn(num_kills: int, rest_s: float) -> Havoc:
    """A random instance so long after the last victim's successor is in service; in the midst the controller."""

    async def havoc(chaos: Chaos) -> None:
        for number in range(num_kills):
            await chaos.see_replaced(chaos.kill_one())
            if number == num_kills // 2:
                await chaos.kill_controller()
            await asyncio.sleep(rest_s)

    return havoc


def pausing(num_pauses: int, lengths_s: Sequence[float]) -> Havoc:
    """A random instance is stopped and woken, again and again, with up to a second in between."""

    async def havoc(chaos: Chaos) -> None:
        for _ in range(num_pauses):
            await chaos.pause_one(chaos.random.choice(lengths_s))
            await asyncio.sleep(chaos.random.uniform(0.0, 1.0))

    return havoc


async def until(condition: Callable[[], bool], what: str, timeout_s: float = _TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise BenchmarkError(f"not within {timeout_s:.0f} s: {what}")
        await asyncio.sleep(_LOOK_S)


async def under_load(load: Load, chaos: Chaos, havoc: Havoc) -> None:
    """Load, `havoc` in the midst of it, and then the load to its end."""
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        try:
            await until(lambda: any(outcome.ended_s for outcome in load.outcomes), "an answer")
            await havoc(chaos)
            num_asked = len(load.outcomes)
            await until(lambda: len(load.outcomes) > num_asked + load.concurrency, "it goes on afterwards")
        finally:
            load.is_over = True
