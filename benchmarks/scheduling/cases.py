"""One simulated run, in a worker process; many of them, longest first, with a bar that says when they will be done."""

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.scheduling.loads import Load
from flowkv.config import load_config
from flowkv.sim.figures import Record, SimResult, Slo, figures
from flowkv.sim.run import simulate

Row = dict[str, Any]

_SPREADS = ("ttft_s", "itl_s", "tpot_s", "e2el_s")
_COUNTS = ("num_requests", "num_errors", "num_refused")
_RATES = ("duration_s", "goodput_per_s", "good_fraction", "output_tokens_per_s")
_ETA_PERIOD_S = 1200.0


@dataclass(frozen=True, slots=True)
class Case:
    """`key` says which run it is, in the words of its benchmark; by `slo` it is judged, whatever it knows of it."""

    configuration: str
    overrides: Mapping[str, Any]  # of flowkv.config.load_config
    load: Load
    slo: Slo
    seed: int = 0
    key: Mapping[str, Any] = field(default_factory=dict)
    phase_s: float | None = None  # report every so many seconds on their own
    weight: float = 1.0  # how long it takes, beside others


@dataclass(slots=True)
class Run:
    """What was asked for."""

    console: Console
    quick: bool = False
    seeds: int = 5
    processes: int = 1
    rounds: int = 3  # of a real server
    profile: Path | None = None  # of this machine
    scratch: Path = Path("results")
    large_requests: int = 1_000_000  # of the largest simulation

    def rows(self, title: str, cases: Sequence[Case]) -> list[Row]:
        """One for each case, in their order."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bars = Progress(
            *columns, TextColumn("left:"), TimeRemainingColumn(), console=self.console, transient=True,
            speed_estimate_period=_ETA_PERIOD_S, disable=not self.console.is_terminal,
        )  # fmt: skip
        rows: list[Row] = [{} for _ in cases]
        order = sorted(range(len(cases)), key=lambda i: -cases[i].weight)
        # Forked from a process that has made threads, a worker may hang.
        with bars, ProcessPoolExecutor(self.processes, mp_context=get_context("spawn")) as executor:
            task = bars.add_task(title, total=len(cases))
            futures = {executor.submit(run_case, cases[i]): i for i in order}
            for future in as_completed(futures):
                rows[futures[future]] = future.result()
                bars.advance(task)
        return rows


def run_case(case: Case) -> Row:
    """Key, configuration and seed of a run, and its figures."""
    config = load_config(None, dict(case.overrides))
    requests = list(case.load.requests())
    started_s = time.perf_counter()
    result = simulate(config, requests, seed=case.seed)
    wall_s = time.perf_counter() - started_s
    row = {**case.key, "configuration": case.configuration, "seed": case.seed, "wall_s": wall_s}
    row |= short_figures(result, case.slo) | roles_taken(result, requests[-1].arrival_s)
    if case.phase_s is not None:
        row["phases"] = [goods / count for goods, count in phases(result.records, case.phase_s, case.slo)]
    return row


def short_figures(result: SimResult, slo: Slo) -> Row:
    whole = figures(result, slo)
    row: Row = {name: whole[name] for name in (*_COUNTS, *_RATES)}
    for name in _SPREADS:
        spread = whole[name]
        row[name] = None if spread is None else {point: spread[point] for point in ("mean", "p50", "p99")}
    return row


def phases(records: Sequence[Record], phase_s: float, slo: Slo) -> list[tuple[int, int]]:
    """(Requests within the SLO, requests) of those that arrived in each stretch of `phase_s`, empty ones left out."""
    counts: dict[int, tuple[int, int]] = {}
    for record in records:
        phase = int(record.arrival_s // phase_s)
        num_good, num = counts.get(phase, (0, 0))
        counts[phase] = (num_good + slo.holds(record), num + 1)
    return [counts[phase] for phase in sorted(counts)]


def roles_taken(result: SimResult, until_s: float) -> Row:
    """How often roles changed, which they were when the last request came, and each instance's share of the time as
    prefill instance in the second half."""
    samples = [sample for sample in result.samples if sample.time_s <= until_s]
    late = samples[len(samples) // 2 :]
    names = samples[-1].instances
    shares = {name: sum(s.instances[name].role == "prefill" for s in late) / len(late) for name in names}
    roles = {name: str(one.role) for name, one in names.items()}
    return {"num_flips": len(result.flips), "roles": roles, "prefill_fraction": shares}


def significant(value: Any, digits: int = 5) -> Any:
    """The same with floats cut to so many digits, since more say nothing; what is not finite becomes None."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: significant(one, digits) for key, one in value.items()}
    return [significant(one, digits) for one in value] if isinstance(value, list | tuple) else value
