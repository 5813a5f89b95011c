"""What is done to a server under load: processes killed, stopped and woken, by a seed."""

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.server import Server
from tests.heavy.load import Ask, Load

_INSTANCE = re.compile(r"(?:prefill|decode|mixed)-\d+(?:~\d+)?")


@dataclass
class Chaos:
    """A server and what has been done to it; the same seed does the same at the same times."""

    server: Server
    seed: int
    deeds: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._began_s = time.monotonic()

    def instances(self) -> dict[str, int]:
        """Process ids by name, those that still start included."""
        return {name: pid for pid, name in self.names().items() if _INSTANCE.fullmatch(name)}

    def names(self) -> dict[int, str]:
        """What `ps` calls each living process of the server but the launcher."""
        names = {}
        for pid in self.server.processes():
            try:
                names[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
        names.pop(self.server.process.pid, None)
        return names

    def kill_one(self) -> str:
        """A random instance; its name."""
        name, pid = self.random.choice(sorted(self.instances().items()))
        self.signal(name, pid, signal.SIGKILL)
        return name

    def signal(self, name: str, pid: int, signum: signal.Signals) -> None:
        self.deeds.append(f"{time.monotonic() - self._began_s:6.2f} s {signum.name} {name}")
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            self.deeds[-1] += " (it had just ended)"

    async def kill_controller(self) -> None:
        """And wait for its successor."""
        [(pid, name)] = [(pid, name) for pid, name in self.names().items() if name.startswith("controller")]
        self.signal(name, pid, signal.SIGKILL)
        await until(lambda: self._has_other(name, pid), "another controller")

    def _has_other(self, name: str, pid: int) -> bool:
        stem = name.partition("~")[0]
        return any(other.startswith(stem) and other_pid != pid for other_pid, other in self.names().items())

    async def pause_one(self, seconds: float) -> None:
        """Stop a random instance so long, and wake it."""
        name, pid = self.random.choice(sorted(self.instances().items()))
        self.signal(name, pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.signal(name, pid, signal.SIGCONT)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        await asyncio.sleep(0.05)


async def under_load(
    server: Server, asks: list[Ask], seed: int, concurrency: int, havoc: Callable[[Chaos], Awaitable[None]]
) -> Load:
    """Load, `havoc` in the midst of it, and then the load to its end; what was done is printed."""
    load, chaos = Load(server.url, asks, concurrency, seed), Chaos(server, seed)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        try:
            await until(lambda: any(outcome.ended_s for outcome in load.outcomes), "an answer")
            await havoc(chaos)
            num_answered = len(load.outcomes)
            await until(lambda: len(load.outcomes) > num_answered + concurrency, "it goes on afterwards")
        finally:
            load.is_over = True
            print(f"seed {seed}, {len(load.outcomes)} requests", *chaos.deeds, sep="\n  ")
    return load
