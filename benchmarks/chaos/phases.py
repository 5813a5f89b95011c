"""One server after the other under the same load: left alone, or not."""

import asyncio
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chaos.figures import phase_figures, seen
from benchmarks.chaos.havoc import Chaos, Havoc, under_load
from benchmarks.chaos.load import Ask, Body, Load, undisturbed
from benchmarks.chaos.running import held, instances, is_well, living, shared_memory, zombies
from benchmarks.spawn import ServerProcess

REST_TIMEOUT_S = 30.0
KEEP_REQUESTS = 100_000
COUNTERS = ("recoveries", "recovered_tokens")


@dataclass
class Contender:
    """A way to serve, and what its clients ask; what it answers undisturbed is asked of its first server."""

    serve: str
    bodies: Sequence[Body]
    concurrency: int
    asks: Sequence[Ask] = ()


@dataclass(frozen=True)
class Phase:
    name: str
    contender: Contender
    havoc: Havoc


def measure(phase: Phase, seed: int, log: Path) -> dict[str, Any]:
    """The phase's figures, and what was left of its server. BenchmarkError where that does not end as it should."""
    contender = phase.contender
    arguments = [*shlex.split(contender.serve), "--set", f"tracing.keep_requests={KEEP_REQUESTS}"]
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(arguments, log, environment={"TMPDIR": folder}, start_new_session=True)
        with server:
            num_instances = len(instances(server))
            result = asyncio.run(_run(phase, server, seed))
            left = _at_rest(server, num_instances)
            mapped = shared_memory(server)
        left["processes"] = [process.name for process in living(server)]
        left["files"] = [file.name for file in Path(folder).iterdir()]
        left["shared_memory"] = [path for path in mapped if Path(path).exists()]
    return {"name": phase.name, "serve": contender.serve, **result, "left": left}


async def _run(phase: Phase, server: ServerProcess, seed: int) -> dict[str, Any]:
    contender = phase.contender
    if not contender.asks:
        contender.asks = await undisturbed(server.url, contender.bodies, contender.concurrency)
    load = Load(server.url, contender.asks, contender.concurrency, seed)
    chaos = Chaos(server, seed)
    async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
        before = await counters(client)
        await under_load(load, chaos, phase.havoc)
        after = await counters(client)
        answer = await client.get("/requests", params={"limit": KEEP_REQUESTS})
    return {
        **phase_figures(seen(load.outcomes, answer.json()["recent"]), chaos.deeds),
        **{f"num_{name}": after[name] - before[name] for name in COUNTERS},
        "deeds": chaos.story(),
    }


async def counters(client: httpx.AsyncClient) -> dict[str, float]:
    """Of the frontend, without prefix."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    values = {family.name.removeprefix("flowkv_"): family.samples[0].value for family in families if family.samples}
    return {name: values[name] for name in COUNTERS}


def _at_rest(server: ServerProcess, num_instances: int) -> dict[str, Any]:
    """What is still held once every instance is well again, or when that has taken too long."""
    deadline_s = time.monotonic() + REST_TIMEOUT_S
    while True:
        found = instances(server)
        left: dict[str, Any] = {
            "seats_empty": num_instances - sum(map(is_well, found)),
            "held": held(server),
            "zombies": zombies(server),
        }
        if not any(left.values()) or time.monotonic() > deadline_s:
            return left
        time.sleep(0.1)
