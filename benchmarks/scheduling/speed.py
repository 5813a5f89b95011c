"""How fast the simulator is, and the controller in it: wall time, memory, placements.

Every run is on one core, in a process of its own, one after the other: the conversation trace on 8 instances step by
step and with steps that only decode made at a stretch, then its lengths over and over on 1,024 instances. One run is
profiled, to say what bounds it; its wall time counts nowhere.
"""

import cProfile
import os
import pstats
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from benchmarks.report import ROOT, print_table
from benchmarks.scheduling import configurations, placement, plots, summary
from benchmarks.scheduling.cases import Run
from benchmarks.scheduling.loads import Load, Repeated, Trace
from flowkv.config import load_config
from flowkv.sim.run import simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "speed"
COST, TTFT_S, TPOT_S = "llama-3.1-8b/h100", 5.0, 0.025
FLEET_SIZES = (8, 64, 1024)
LARGE_REQUESTS = 1_000_000
NUM_TOP = 15
WANTED_RATIO = {"step by step": 100.0, "coalesced": 1000.0}
WANTED_S, WANTED_BYTES, WANTED_US = 900.0, 8 * 2**30, 200.0
PROFILED_REQUESTS = 2000

Results = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timed:
    """`num_instances` half prefill, half decode, flexible, with an SLO."""

    name: str
    num_instances: int
    load: Load
    coalesce: bool = True


def runs(quick: bool, large_requests: int = LARGE_REQUESTS) -> tuple[list[Timed], Timed, Timed]:
    """(Trace runs, the large one, the one to profile)."""
    num_requests, num_instances = (20_000, 64) if quick else (large_requests, 1024)
    trace = Trace("conversation", 1.0, 400 if quick else None)
    # As many requests an instance as in the trace on 8.
    large = Repeated("conversation", num_requests, num_instances / 8)
    small = Trace("conversation", 1.0, PROFILED_REQUESTS // 10 if quick else PROFILED_REQUESTS)
    return (
        [Timed("step by step", 8, trace, coalesce=False), Timed("coalesced", 8, trace)],
        Timed(f"{num_requests:,} requests", num_instances, large),
        Timed("profiled", 8, small),
    )


def measure(run: Run) -> Results:
    traces, large, profiled = runs(run.quick, run.large_requests)
    steps: list[tuple[str, Callable[[], Any]]] = [
        *((one.name, lambda one=one: alone(timed, one)) for one in traces),
        ("placements", lambda: [alone(placement.measure, n, 200 if run.quick else 3000) for n in FLEET_SIZES]),
        ("profile", lambda: alone(profile_by_file, profiled)),
        (large.name, lambda: alone(timed, large)),
    ]
    found: list[Any] = []
    with Progress(console=run.console, transient=True, disable=not run.console.is_terminal) as bars:
        task = bars.add_task("speed", total=len(steps))
        for name, step in steps:
            bars.update(task, description=name)
            found.append(step())
            bars.advance(task)
    *trace_rows, placements, top, large_row = found
    return {"traces": trace_rows, "placements": placements, "profile": top, "large": large_row}


def alone(call: Callable[..., T], *arguments: Any) -> T:
    """In a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_one_core) as executor:
        return executor.submit(call, *arguments).result()


def _one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def timed(one: Timed) -> dict[str, Any]:
    """Wall time from the first event to the last result, making the requests included."""
    config = load_config(None, _cluster(one))
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    result = simulate(config, one.load.requests(), coalesce=one.coalesce)
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    num_steps = sum(counters.num_steps for counters in result.counters.values())
    return {
        "name": one.name, "num_instances": one.num_instances, "num_requests": len(result.records),
        "num_errors": sum(record.error is not None for record in result.records),
        "simulated_s": result.duration_s, "wall_s": wall_s, "cpu_s": cpu_s, "ratio": result.duration_s / wall_s,
        "num_events": result.num_events, "num_steps": num_steps, "events_per_s": result.num_events / wall_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def profile_by_file(one: Timed) -> dict[str, Any]:
    """Share of the time spent in the code of each file itself, the `NUM_TOP` largest."""
    config, requests = load_config(None, _cluster(one)), list(one.load.requests())
    profiler = cProfile.Profile()
    profiler.runcall(simulate, config, requests)
    spent_s: dict[str, float] = {}
    for (path, _, function), (_, _, own_s, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        name = _short(path, function)
        spent_s[name] = spent_s.get(name, 0.0) + own_s
    whole_s = sum(spent_s.values())
    largest = sorted(spent_s, key=lambda name: -spent_s[name])[:NUM_TOP]
    return {"num_requests": len(requests), "fractions": {name: spent_s[name] / whole_s for name in largest}}


def _short(path: str, function: str) -> str:
    """A file of this repository by its path there, one of a package by its name, what is not Python by function."""
    if path == "~":
        return function
    parts = Path(path).parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :][:2])
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else parts[-1]


def _cluster(one: Timed) -> configurations.Overrides:
    base = configurations.base(COST, TTFT_S, TPOT_S)
    return configurations.flexible(base, one.num_instances // 2, one.num_instances)


# --- what it says --------------------------------------------------------------------------------------------------


def show(console: Console, results: Results) -> None:
    header = (
        "run", "instances", "requests", "simulated\ns", "wall\ns", "times\nreal time", "events", "steps", "events/s",
        "peak RSS\nMiB",
    )  # fmt: skip
    large = results["large"]
    print_table(console, header, [_cells(row) for row in (*results["traces"], large)], "The simulator, on one core")
    for row in results["traces"]:
        wanted = WANTED_RATIO[row["name"]]
        is_met = summary.verdict(row["ratio"] >= wanted)
        console.print(f"{row['name']}: {row['ratio']:.0f} times real time (wanted: {wanted:.0f}): {is_met}")
    is_met = large["wall_s"] <= WANTED_S and large["peak_rss_bytes"] <= WANTED_BYTES
    console.print(
        f"{large['name']} on {large['num_instances']:,} instances: {large['wall_s'] / 60:.1f} min,"
        f" {large['peak_rss_bytes'] / 2**30:.2f} GiB (wanted of 1,000,000 on 1,024: 15 min, 8 GiB):"
        f" {summary.verdict(is_met)}"
    )
    rows = [
        [f"{one['num_instances']:,}", *(f"{one[key][at]:.0f}" for key in ("place_us", "whole_us") for at in _POINTS)]
        for one in results["placements"]
    ]
    print_table(console, ("instances", "place p50", "p99", "with ask and assign p50", "p99"), rows, "A placement, us")
    slowest = results["placements"][-1]["place_us"]["p50"]
    console.print(
        f"median of the largest: {slowest:.0f} us (wanted: {WANTED_US:.0f}): {summary.verdict(slowest < WANTED_US)}"
    )
    fractions = results["profile"]["fractions"].items()
    print_table(
        console, ("file", "%"), [[name, summary.percent(share)] for name, share in fractions], "Where time goes"
    )


_POINTS = ("p50", "p99")


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"], f"{row['num_instances']:,}", f"{row['num_requests']:,}", f"{row['simulated_s']:,.0f}",
        f"{row['wall_s']:,.1f}", f"{row['ratio']:,.0f}", f"{row['num_events']:,}", f"{row['num_steps']:,}",
        f"{row['events_per_s']:,.0f}", f"{row['peak_rss_bytes'] / 2**20:,.0f}",
    ]  # fmt: skip


def draw(results: Results) -> "Figure":
    figure, ((left, right),) = plots.panels(1, 2, 4.6, 3.6)
    rows = results["traces"]
    names = [row["name"] for row in rows]
    bars = left.bar(names, [row["ratio"] for row in rows], color=("#8fb2f0", "#2f6fde"), width=0.5)
    left.bar_label(bars, [f"{row['ratio']:,.0f}" for row in rows], fontsize=9)
    for i, name in enumerate(names):
        left.hlines(WANTED_RATIO[name], i - 0.35, i + 0.35, color=plots.LIMIT, ls="--")
    left.set_yscale("log")
    left.set_ylim(10, 10_000)
    plots.label(left, "59 minutes of conversations, 8 instances", "dashed: wanted", "times real time")
    fractions = list(results["profile"]["fractions"].items())[:10][::-1]
    right.barh([name for name, _ in fractions], [100 * share for _, share in fractions], color="#1b7f5c")
    plots.label(right, "Where the time goes", "% of a profiled run", "")
    right.tick_params(axis="y", labelsize=7)
    return figure
