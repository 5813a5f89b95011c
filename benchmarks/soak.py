"""Does anything grow? Half an hour of mixed traffic at a share of what the server can do, its processes watched.

    python -m benchmarks.soak                    # 30 minutes at 70 %, on toy instances
    python -m benchmarks.soak --minutes 2 --settle-minutes 0.5

Streams of all sizes, chats, several choices, clients that leave in the midst of an answer, bodies that are refused,
scrapes of /metrics and /cluster every second as Prometheus and a dashboard make them. Resident memory and open files of
each process are read every `--interval` seconds; growth is that of the last minute's mean over the mean of the minute
after `--settle-minutes`.
"""

import argparse
import asyncio
import contextlib
import random
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.client import Client
from benchmarks.open_loop import TOY_VOCAB, Shape, capacity
from benchmarks.report import ROOT, print_table, write_results
from benchmarks.spawn import ServerProcess, exit_on_sigterm

SERVE = (
    "--toy --prefill 1 --decode 1 --set toy_step_s=0.02 --set engine.max_choices=8 --set engine.max_batch_tokens=128 "
    "--kv-memory 256KiB"
)
SHAPE = Shape(num_prompt=64, num_output=32)  # the mean of what is sent, about: the capacity is measured with it
CALIBRATION_S = 15.0
SCRAPE_S = 1.0
WINDOW_S = 60.0
MAX_PROMPT, MAX_OUTPUT = 127, 63
REFUSED_FRACTION = 0.05  # of the traffic are bodies that cannot be
LEAVING_FRACTION = 0.05  # clients that do not wait for the end


@dataclass
class Traffic:
    """What clients have done and seen."""

    client: Client
    http: httpx.AsyncClient
    random: random.Random
    seen: Counter[str] = field(default_factory=Counter)

    async def run(self, rate: float, seconds: float) -> None:
        """Poisson arrivals; returns when all are answered."""
        end_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self._scrape(end_s))
            while time.monotonic() < end_s:
                group.create_task(self._one())
                await asyncio.sleep(self.random.expovariate(rate))

    async def _one(self) -> None:
        chosen = self.random.random()
        if chosen < REFUSED_FRACTION:
            await self._refused()
        elif chosen < REFUSED_FRACTION + LEAVING_FRACTION:
            await self._leaving()
        else:
            path, body = self._body()
            answer = await self.client.send(self.client.encode(path, body))
            self.seen["answered" if answer.error is None else f"error: {answer.error}"] += 1

    async def _refused(self) -> None:
        bodies: list[Any] = [
            {},
            {"prompt": ""},
            {"prompt": "x", "n": -1},
            {"prompt": "x", "model": str(time.time_ns())},
        ]
        answer = await self.http.post("/v1/completions", json=self.random.choice(bodies))
        self.seen[f"status {answer.status_code}"] += 1

    async def _leaving(self) -> None:
        path, body = self._body()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.random.uniform(0.0, 0.3)):
                await self.client.send(self.client.encode(path, body | {"max_tokens": 200}))
        self.seen["left"] += 1

    def _body(self) -> tuple[str, dict[str, object]]:
        rng = self.random
        num_prompt, num_output = rng.randint(1, MAX_PROMPT), rng.randint(1, MAX_OUTPUT)
        sampling = {"max_tokens": num_output, "temperature": rng.choice([0.0, 1.0])}
        if rng.random() < 0.3:
            text = "".join(rng.choices("abcdefgh ", k=num_prompt))
            return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **sampling}
        prompt = [rng.randrange(TOY_VOCAB) for _ in range(num_prompt)]
        more: dict[str, object] = rng.choice([{}, {"n": 2}, {"stop": ["zz", "%"]}, {"logprobs": 2}, {"user": "u" * 20}])
        return "/v1/completions", {"prompt": prompt, **sampling, **more}

    async def _scrape(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            for path in ("/metrics", "/cluster"):
                answer = await self.http.get(path)
                self.seen[f"{path} {answer.status_code}"] += 1
            await asyncio.sleep(SCRAPE_S)


@dataclass(frozen=True)
class Sample:
    at_s: float
    rss_bytes: int
    num_files: int


async def watch(pid: int, interval_s: float, samples: dict[str, list[Sample]]) -> None:
    """Every process of the server until cancelled, by name."""
    start_s = time.monotonic()
    while True:
        for name, process in processes(pid).items():
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                sample = Sample(time.monotonic() - start_s, process.memory_info().rss, process.num_fds())
                samples[name].append(sample)
        await asyncio.sleep(interval_s)


def processes(pid: int) -> dict[str, psutil.Process]:
    """The launcher and all below it; two of one name are numbered."""
    launcher = psutil.Process(pid)
    found: dict[str, psutil.Process] = {"launcher": launcher}
    for process in launcher.children(recursive=True):
        name = process.name()
        found[name if name not in found else f"{name} {len(found)}"] = process
    return found


def growth(samples: Sequence[Sample], settle_s: float) -> dict[str, float]:
    """Of one process, from the minute after `settle_s` to the last one. BenchmarkError where there are no such two."""
    end_s = samples[-1].at_s
    window_s = min(WINDOW_S, (end_s - settle_s) / 2)
    early = [s for s in samples if settle_s <= s.at_s < settle_s + window_s]
    late = [s for s in samples if s.at_s > end_s - window_s]
    if window_s <= 0 or not early or not late:
        raise BenchmarkError(f"{end_s:.0f} s are too few to see growth after {settle_s:.0f} s")
    before, after = (sum(s.rss_bytes for s in part) / len(part) for part in (early, late))
    return {
        "rss_bytes_before": before,
        "rss_bytes_after": after,
        "growth_fraction": after / before - 1,
        "max_files_before": max(s.num_files for s in early),
        "max_files_after": max(s.num_files for s in late),
    }


async def soak(server: ServerProcess, url: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    client = Client(url, timeout_s=60.0)
    rate = args.rate or args.load * await capacity(client, SHAPE, CALIBRATION_S, args.seed)
    console.print(f"{rate:.1f} requests/s for {args.minutes:g} minutes", highlight=False)
    samples: dict[str, list[Sample]] = defaultdict(list)
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
        traffic = Traffic(client, http, random.Random(args.seed))
        watching = asyncio.create_task(watch(server.pid, args.interval, samples))
        await traffic.run(rate, 60.0 * args.minutes)
        watching.cancel()
    return {
        "rate_per_s": rate,
        "seen": dict(sorted(traffic.seen.items())),
        "processes": {name: growth(of, 60.0 * args.settle_minutes) for name, of in samples.items()},
        "samples": {
            name: [[round(s.at_s, 1), s.rss_bytes, s.num_files] for s in of] for name, of in samples.items()
        },
    }  # fmt: skip


def show(console: Console, result: Mapping[str, Any]) -> None:
    header = ("process", "MiB\nbefore", "\nafter", "\ngrowth", "files\nbefore", "\nafter")
    rows = [
        [
            name,
            f"{one['rss_bytes_before'] / 2**20:.1f}",
            f"{one['rss_bytes_after'] / 2**20:.1f}",
            f"{one['growth_fraction']:+.2%}",
            str(one["max_files_before"]),
            str(one["max_files_after"]),
        ]
        for name, one in result["processes"].items()
    ]
    print_table(console, header, rows, ", ".join(f"{count} {what}" for what, count in result["seen"].items()))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", default=SERVE, metavar="ARGS", help="`flowkv serve ARGS`")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--settle-minutes", type=float, default=5.0, help="before growth counts")
    parser.add_argument("--load", type=float, default=0.7, help="of the capacity, which is measured first")
    parser.add_argument("--rate", type=float, help="requests a second, instead")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two looks at the processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "soak.json")
    return parser.parse_args(arguments)


def main() -> None:
    args, console = parse_arguments(), Console()
    exit_on_sigterm()
    server = ServerProcess(shlex.split(args.serve), args.output.parent / "soak.log")
    try:
        with server as url:
            result = asyncio.run(soak(server, url, args, console))
    except BenchmarkError as error:
        sys.exit(f"benchmarks.soak: {error}")
    show(console, result)
    write_results(console, args, result)


if __name__ == "__main__":
    main()
