"""Does contiguity last? Runs per transfer after 100,000 requests at 90 % occupancy, for five ways to allocate.

A replay drives the allocators of a prefill pool and a decode pool, both full, with the lengths of a trace. Requests
reach P in trace order (a trace that is used up starts again, shuffled) and wait there, with their whole prompt
allocated, until D has room. Then the prompt crosses, and D grows it by one token a step until its output ends, which no
allocator knows before. Neither side admits a request that would take its live KV beyond 90 % of its blocks; what grows
goes beyond. So the events are the same for every design: only where blocks lie differs.

Requests leave P in order of arrival (one decode instance), or a random one leaves next (many decode instances).
"""

import argparse
import csv
import gzip
import heapq
import operator
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import BenchmarkError
from benchmarks.report import ROOT, percentile, print_table, summarize, write_report
from flowkv.kv.blocks import BlockManager
from flowkv.kv.segments import SegmentAllocator
from flowkv.transfer.plan import plan_runs

BLOCK_SIZE = 16
MAX_SEGMENTS = 2  # a side; two on either side are at most three runs
NUM_TENTHS = 10
TRACES = {"mooncake": "mooncake_lengths.csv.gz", "azure code": "azure_code_lengths.csv.gz"}
POOLS = (8000, 30000)
ORDERS = ("arrival", "random")
SIDES = ("prefill", "decode")
BLOCK_BYTES = 2 * 2**20  # Llama-3.1-8B in bfloat16: what a moved block costs


T = TypeVar("T")


# --- five ways to allocate -----------------------------------------------------------------------------------------


class Pool(Protocol):
    """One side's blocks. `movable` are tables that nobody reads or writes at the moment."""

    num_moved: int

    def allocate(self, num_blocks: int, movable: Sequence[list[int]]) -> list[int]: ...

    def grow(self, table: list[int]) -> None: ...

    def free(self, table: list[int]) -> None: ...

    def free_segments(self) -> list[tuple[int, int]]: ...


class FreeList:
    """A queue of single blocks: taken at the front, given back at the end.

    vLLM gives a request's last block back first (`SingleTypeKVCacheManager.free`, `FreeKVCacheBlockQueue`).
    """

    num_moved = 0

    def __init__(self, num_blocks: int, last_first: bool) -> None:
        self._free = deque(range(num_blocks))
        self._last_first = last_first

    def allocate(self, num_blocks: int, movable: Sequence[list[int]]) -> list[int]:
        return [self._free.popleft() for _ in range(num_blocks)]

    def grow(self, table: list[int]) -> None:
        table.append(self._free.popleft())

    def free(self, table: list[int]) -> None:
        self._free.extend(reversed(table) if self._last_first else table)
        table.clear()

    def free_segments(self) -> list[tuple[int, int]]:
        ordered = sorted(self._free)
        cuts = [i for i, step in enumerate(map(operator.sub, ordered[1:], ordered), 1) if step != 1]
        return [(ordered[i], j - i) for i, j in pairwise([0, *cuts, len(ordered)])] if ordered else []


class GrowthBehind:
    """Segments, best fit; a request grows into the block behind it, or else into the smallest segment."""

    num_moved = 0

    def __init__(self, num_blocks: int) -> None:
        self._segments = SegmentAllocator(num_blocks)

    def allocate(self, num_blocks: int, movable: Sequence[list[int]]) -> list[int]:
        return _found(self._segments.allocate(num_blocks))

    def grow(self, table: list[int]) -> None:
        behind = table[-1] + 1
        is_free = any(start == behind for start, _ in self._segments.segments())
        table += self._segments.claim(behind, 1) if is_free else _found(self._segments.allocate(1))

    def free(self, table: list[int]) -> None:
        self._segments.free(table)
        table.clear()

    def free_segments(self) -> list[tuple[int, int]]:
        return self._segments.segments()


class Managed:
    """The `BlockManager` that instances use."""

    def __init__(self, num_blocks: int, moves: bool) -> None:
        self.num_moved = 0
        self._blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self._moves = moves

    def allocate(self, num_blocks: int, movable: Sequence[list[int]]) -> list[int]:
        if not self._moves:
            return _found(self._blocks.allocate(num_blocks))
        blocks, copies = _found(self._blocks.allocate_within(num_blocks, MAX_SEGMENTS, movable))
        self.num_moved += len(copies)
        return blocks

    def grow(self, table: list[int]) -> None:
        num_tokens = len(table) * BLOCK_SIZE
        _found(self._blocks.prepare_write(table, num_tokens, num_tokens + 1))

    def free(self, table: list[int]) -> None:
        self._blocks.free(table)

    def free_segments(self) -> list[tuple[int, int]]:
        return self._blocks.free_segments()


def _found(allocated: T | None) -> T:
    assert allocated is not None, "a replay asks only for blocks that are free"
    return allocated


DESIGNS: dict[str, Callable[[int], Pool]] = {
    "free list, as vLLM": lambda num_blocks: FreeList(num_blocks, last_first=True),
    "free list, in order": lambda num_blocks: FreeList(num_blocks, last_first=False),
    "segments, growth behind": GrowthBehind,
    "segments": lambda num_blocks: Managed(num_blocks, moves=False),
    "segments, moves": lambda num_blocks: Managed(num_blocks, moves=True),
}


# --- a replay ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    trace: str
    num_blocks: int
    order: str
    design: str
    num_requests: int = 100_000
    occupancy: float = 0.9
    seed: int = 0

    @property
    def max_live(self) -> float:
        return self.occupancy * self.num_blocks


class Request(NamedTuple):
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def num_prompt_blocks(self) -> int:
        return -(-self.num_prompt_tokens // BLOCK_SIZE)

    @property
    def num_steps(self) -> int:
        """Steps on D, which takes the first token as given; one at least, as D cannot know that it was the last."""
        return max(1, self.num_output_tokens - 1)


def read_lengths(path: Path) -> list[Request]:
    """Raises BenchmarkError for a file that is not two columns of lengths."""
    try:
        with gzip.open(path, "rt", newline="") as file:
            return [Request(int(row[0]), int(row[1])) for row in islice(csv.reader(file), 1, None)]
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise BenchmarkError(f"{path}: not a gzipped file of prompt and output lengths: {error}") from error


def repeated(trace: Sequence[Request], seed: int) -> Iterator[Request]:
    """The trace as it is, then shuffled again and again; it never ends, so that P stays full to the last transfer."""
    rng = random.Random(f"repetition/{seed}")
    order = list(trace)
    while True:
        yield from order
        rng.shuffle(order)


@dataclass(slots=True)
class Held:
    """A request and its blocks on one side."""

    request: Request
    table: list[int]
    admitted_step: int = 0


class Side:
    """One pool, what is live in it, and how long its allocator took (us)."""

    def __init__(self, pool: Pool, num_blocks: int, max_live: float) -> None:
        self.pool = pool
        self.num_blocks = num_blocks
        self.max_live = max_live
        self.num_live = 0
        self.times_us: dict[str, list[float]] = {"allocate": [], "grow": [], "free": []}

    @property
    def is_full(self) -> bool:
        return self.num_live == self.num_blocks

    def has_room(self, request: Request) -> bool:
        return self.num_live + request.num_prompt_blocks <= self.max_live

    def allocate(self, request: Request, movable: Iterable[Held]) -> list[int]:
        tables = [held.table for held in movable]
        self.num_live += request.num_prompt_blocks
        return self._timed("allocate", lambda: self.pool.allocate(request.num_prompt_blocks, tables))

    def grow(self, held: Held) -> None:
        self.num_live += 1
        self._timed("grow", lambda: self.pool.grow(held.table))

    def free(self, held: Held) -> None:
        self.num_live -= len(held.table)
        self._timed("free", lambda: self.pool.free(held.table))

    def _timed(self, name: str, call: Callable[[], T]) -> T:
        started_s = time.perf_counter()
        result = call()
        self.times_us[name].append((time.perf_counter() - started_s) * 1e6)
        return result


@dataclass(slots=True)
class Record:
    """Of each transfer runs and segments; of the pools `samples`, by name."""

    runs: list[int] = field(default_factory=list)
    src_segments: list[int] = field(default_factory=list)
    dst_segments: list[int] = field(default_factory=list)
    num_blocks: int = 0
    num_cut: int = 0  # requests that ended early because D was full to the last block
    samples: dict[str, list[float]] = field(default_factory=dict)


class Replay:
    """P and D over the same design. D's events are its growth and its ends, by step."""

    def __init__(self, case: Case, requests: Iterator[Request]) -> None:
        self.prefill, self.decode = (
            Side(DESIGNS[case.design](case.num_blocks), case.num_blocks, case.max_live) for _ in range(2)
        )
        self.record = Record()
        self._is_random = case.order == "random"
        self._rng = random.Random(f"leaving/{case.seed}")
        self._requests = requests
        self._arriving = next(requests)
        self._waiting: list[Held] = []  # on P
        self._next: Held | None = None  # of those waiting, the one that leaves P when D has room
        self._decoding: dict[int, Held] = {}  # on D, by a number that orders events of one step
        self._events: list[tuple[int, bool, int]] = []  # (step, whether the request ends, number)
        self._step = 0

    def run(self, num_requests: int) -> None:
        """Until that many have crossed."""
        period = max(1, num_requests // (NUM_TENTHS * 50))
        self._admit()
        while len(self.record.runs) < num_requests:
            if self._next is None:
                self._next = self._waiting[self._rng.randrange(len(self._waiting)) if self._is_random else 0]
            if not self.decode.has_room(self._next.request):
                self._advance()
                continue
            self._hand_over(self._next)
            self._admit()
            if len(self.record.runs) % period == 0:
                self._sample()

    def _admit(self) -> None:
        """Whole prompts onto P, in order. What is computed last, and what is about to leave, does not move."""
        while self.prefill.has_room(self._arriving):
            movable = (held for held in self._waiting[:-1] if held is not self._next)
            self._waiting.append(Held(self._arriving, self.prefill.allocate(self._arriving, movable)))
            self._arriving = next(self._requests)

    def _hand_over(self, source: Held) -> None:
        request, record = source.request, self.record
        movable = (held for held in self._decoding.values() if held.admitted_step < self._step)
        target = Held(request, self.decode.allocate(request, movable), self._step)
        record.runs.append(len(plan_runs(source.table, target.table)))
        record.src_segments.append(num_segments(source.table))
        record.dst_segments.append(num_segments(target.table))
        record.num_blocks += len(target.table)
        self._next = None
        self._waiting.remove(source)
        self.prefill.free(source)
        number = len(record.runs)
        self._decoding[number] = target
        heapq.heappush(self._events, (self._step + request.num_steps, True, number))
        self._push_growth(number, target)

    def _push_growth(self, number: int, held: Held) -> None:
        """The step that writes the first slot behind the table, if the request lives to see it."""
        step = held.admitted_step + len(held.table) * BLOCK_SIZE - held.request.num_prompt_tokens + 1
        if step <= held.admitted_step + held.request.num_steps:
            heapq.heappush(self._events, (step, False, number))

    def _advance(self) -> None:
        """The next event on D."""
        self._step, is_end, number = heapq.heappop(self._events)
        if (held := self._decoding.get(number)) is None:
            return
        if is_end or self.decode.is_full:
            self.record.num_cut += not is_end
            self.decode.free(self._decoding.pop(number))
        else:
            self.decode.grow(held)
            self._push_growth(number, held)

    def _sample(self) -> None:
        samples = self.record.samples
        for name, side in zip(SIDES, (self.prefill, self.decode), strict=True):
            lengths = [length for _, length in side.pool.free_segments()]
            samples.setdefault(f"{name}_live_fraction", []).append(side.num_live / side.num_blocks)
            samples.setdefault(f"{name}_free_segments", []).append(len(lengths))
            samples.setdefault(f"{name}_largest_fraction", []).append(max(lengths) / sum(lengths) if lengths else 0.0)


def num_segments(table: list[int]) -> int:
    return len(table) - list(map(operator.sub, table[1:], table)).count(1)


# --- the report ----------------------------------------------------------------------------------------------------


def run_case(case: Case) -> dict[str, Any]:
    """Requests larger than what a side may hold are left out, and counted."""
    trace = read_lengths(ROOT / "benchmarks" / "data" / TRACES[case.trace])
    fitting = [request for request in trace if request.num_prompt_blocks <= case.max_live]
    replay = Replay(case, repeated(fitting, case.seed))
    replay.run(case.num_requests)
    return {**asdict(case), "num_left_out": len(trace) - len(fitting), **figures(replay)}


def figures(replay: Replay) -> dict[str, Any]:
    record = replay.record
    sides = dict(zip(SIDES, (replay.prefill, replay.decode), strict=True))
    return {
        "runs": summarize(record.runs),
        "over_three_fraction": sum(runs > 3 for runs in record.runs) / len(record.runs),
        "src_segments": summarize(record.src_segments),
        "dst_segments": summarize(record.dst_segments),
        "num_blocks_transferred": record.num_blocks,
        "num_blocks_moved": {name: side.pool.num_moved for name, side in sides.items()},
        "num_cut": record.num_cut,
        "allocator_us": {
            name: {call: summarize(times_us) for call, times_us in side.times_us.items()}
            for name, side in sides.items()
        },
        "tenths": {"runs": tenths(record.runs), **{name: tenths(values) for name, values in record.samples.items()}},
    }


def tenths(values: Sequence[float]) -> list[float]:
    """The mean of each tenth of the replay, in order."""
    return [round(float(part.mean()), 4) for part in np.array_split(np.asarray(values), NUM_TENTHS) if part.size]


def add_move_prices(results: Sequence[dict[str, Any]], copy_us: float) -> None:
    """What a call must cost for moving blocks to pay: moved blocks' copies over the runs they save."""
    mean_runs = {_key(result): result["runs"]["mean"] for result in results if result["design"] == "segments"}
    for result in results:
        num_moved = sum(result["num_blocks_moved"].values())
        if num_moved and _key(result) in mean_runs:
            num_saved = (mean_runs[_key(result)] - result["runs"]["mean"]) * result["num_requests"]
            result["blocks_moved_per_run_saved"] = num_moved / num_saved if num_saved > 0 else None
            result["break_even_call_us"] = num_moved / num_saved * copy_us if num_saved > 0 else None


def _key(result: dict[str, Any]) -> tuple[str, int, str]:
    return result["trace"], result["num_blocks"], result["order"]


def block_copy_us(seed: int, num_copies: int = 200) -> float:
    """Median time to copy one block of 2 MiB to another place in memory that is in no cache."""
    memory = np.ones((128, BLOCK_BYTES), np.uint8)
    rng = random.Random(seed)
    times_us = []
    for _ in range(num_copies):
        src, dst = rng.sample(range(len(memory)), 2)
        started_s = time.perf_counter()
        memory[dst] = memory[src]
        times_us.append((time.perf_counter() - started_s) * 1e6)
    return percentile(times_us, 0.5)


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    header = (
        "P / D", "runs\np50", "\np99", "\nmax", "\nmean", "\nover 3", "segments\np99", "\nlive %", "free\nsegments",
        "largest\nof free %", "\nmoved %", "allocate\nus", "grow\nus",
    )  # fmt: skip
    for trace, num_blocks, order in dict.fromkeys(_key(result) for result in results):
        rows = [row(result) for result in results if _key(result) == (trace, num_blocks, order)]
        print_table(console, header, rows, f"{trace}, {num_blocks:,} blocks, requests leave P in order of {order}")


def row(result: dict[str, Any]) -> list[str]:
    """Shares and segments of the pools are those of the last tenth."""
    runs, last = result["runs"], {name: values[-1] for name, values in result["tenths"].items()}
    us, num_blocks = result["allocator_us"], result["num_blocks_transferred"]
    return [
        result["design"],
        *(f"{runs[name]:.0f}" for name in ("p50", "p99", "max")),
        f"{runs['mean']:.2f}",
        f"{result['over_three_fraction']:.2%}",
        " / ".join(f"{result[name]['p99']:.0f}" for name in ("src_segments", "dst_segments")),
        " / ".join(f"{last[f'{side}_live_fraction'] * 100:.0f}" for side in SIDES),
        " / ".join(f"{last[f'{side}_free_segments']:.0f}" for side in SIDES),
        " / ".join(f"{last[f'{side}_largest_fraction'] * 100:.0f}" for side in SIDES),
        " / ".join(f"{result['num_blocks_moved'][side] / num_blocks * 100:.2f}" for side in SIDES),
        " / ".join(f"{us[side]['allocate']['mean']:.0f}" for side in SIDES),
        f"{us['decode']['grow']['mean']:.1f}" if us["decode"]["grow"] else "-",
    ]


def run_all(console: Console, cases: Sequence[Case], num_processes: int) -> list[dict[str, Any]]:
    """Every case, in the order given."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(num_processes) as executor:
        task = progress.add_task("replays", total=len(cases))
        futures = {executor.submit(run_case, case): i for i, case in enumerate(cases)}
        results: list[dict[str, Any]] = [{} for _ in cases]
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            progress.advance(task)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.churn", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--occupancy", type=float, default=0.9, help="share of a pool that admissions may fill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", choices=TRACES, action="append", help="one of them only (default: both)")
    parser.add_argument("--num-blocks", type=int, action="append", help="blocks of a pool (default: 8000 and 30000)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="replays at a time")
    parser.add_argument("--output", type=Path, default=Path("results/churn.json"))
    args = parser.parse_args()
    console = Console()
    combinations = product(args.trace or TRACES, args.num_blocks or POOLS, ORDERS, DESIGNS)
    cases = [Case(*combination, args.requests, args.occupancy, args.seed) for combination in combinations]
    results = run_all(console, cases, args.processes)
    copy_us = block_copy_us(args.seed)
    add_move_prices(results, copy_us)
    show(console, results)
    write_report(
        args.output,
        {"block_size": BLOCK_SIZE, "max_segments": MAX_SEGMENTS, "block_copy_us": copy_us, "replays": results},
    )
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
