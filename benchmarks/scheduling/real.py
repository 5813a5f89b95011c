"""The same shifting load on real servers of this machine and in the simulator: do they put the clusters in one order?

2 instances of the bundled model, with roles fixed (1P1D), both mixed, and flexible. Prompt-heavy and decode-heavy
phases alternate, at a share of what the machine could do at most according to its profile. The simulator runs the same
requests on that profile (`flowkv profile --concurrency 2`), and learns of the real runs nothing.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks import BenchmarkError, serve
from benchmarks.report import print_table
from benchmarks.scheduling import plots, summary
from benchmarks.scheduling.cases import Row, Run, short_figures
from benchmarks.scheduling.loads import full_rate, rounded
from benchmarks.spawn import ServerProcess
from flowkv.config import load_config
from flowkv.sim import workload
from flowkv.sim.costs import CostModel, cost_model, read_profile
from flowkv.sim.figures import Slo
from flowkv.sim.run import simulate
from flowkv.sim.workload import LogNormal, Phase, TraceRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "real"
CLUSTERS: dict[str, dict[str, Any]] = {
    "fixed 1P1D": {"prefill": 1, "decode": 1, "scheduling.roles": "fixed"},
    "mixed 2": {"prefill": 0, "decode": 0, "mixed": 2, "scheduling.roles": "fixed"},
    "flexible": {"prefill": 1, "decode": 1, "scheduling.roles": "flexible"},
}
SHAPES = ((1200, 16), (60, 240))  # tokens in and out; the model holds 2,048
SPREAD = 0.2
SHARE = 0.4  # of what fits, were the machine to serve and nothing else: the client and the frontend use it too
NUM_TURNS = 4
TURN_S, QUICK_TURN_S = 30.0, 3.0
FIGURES = {"E2E mean": ("e2el_s", "mean"), "TTFT mean": ("ttft_s", "mean"), "ITL p99": ("itl_s", "p99")}

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shifting:
    """`SHAPES` in turns of `turn_s`, each at its rate."""

    rates: tuple[float, ...]
    turn_s: float
    seed: int = 0

    def requests(self) -> list[TraceRequest]:
        phases = [
            Phase(rate, LogNormal(prompt, SPREAD), LogNormal(output, SPREAD))
            for rate, (prompt, output) in zip(self.rates, SHAPES, strict=True)
        ]
        return workload.shifting(phases, self.turn_s, NUM_TURNS * self.turn_s, self.seed)


def measure(run: Run) -> Results:
    path = run.profile or profiled(run)
    load = Shifting(rates(cost_model(str(path))), QUICK_TURN_S if run.quick else TURN_S)
    requests = load.requests()
    rounds = 1 if run.quick else run.rounds
    real = serve_all(run, requests, rounds)
    simulated = {name: simulated_rows(path, overrides, requests, rounds) for name, overrides in CLUSTERS.items()}
    return {
        "profile": read_profile(path).hardware, "rates": load.rates, "shapes": SHAPES, "turn_s": load.turn_s,
        "num_requests": len(requests), "clusters": CLUSTERS, "real": real, "simulated": simulated,
        "pairs": [compare(real, simulated, *pair) for pair in combinations(CLUSTERS, 2)],
    }  # fmt: skip


def rates(cost: CostModel, num_instances: int = 2, share: float = SHARE) -> tuple[float, ...]:
    """Requests/s of each shape that take this share of what the instances can do, each doing both phases."""
    return tuple(rounded(full_rate([cost] * num_instances, prompt, output), share) for prompt, output in SHAPES)


def profiled(run: Run) -> Path:
    """Measure this machine, two instances at a time. Raises BenchmarkError where that fails."""
    path = run.scratch / "profile.json"
    program = Path(sys.executable).with_name("flowkv")
    command = [str(program), "profile", "--out", str(path), "--concurrency", "2", *(["--quick"] if run.quick else [])]
    run.console.print(f"measuring this machine: {shlex.join(command[1:])}", highlight=False)
    if subprocess.run(command, check=False).returncode != 0:
        raise BenchmarkError("flowkv profile failed; give the file of one that did not with --profile")
    return path


# --- real ----------------------------------------------------------------------------------------------------------


def serve_all(run: Run, requests: Sequence[TraceRequest], rounds: int) -> dict[str, list[Row]]:
    """The clusters in turns, one row a round. Raises BenchmarkError where a request fails."""
    args = serve.parse_arguments(["--serve", "", "--output", str(run.scratch / "serve.json")])
    measured = [_configuration(name, overrides, run.scratch) for name, overrides in CLUSTERS.items()]
    for _ in range(rounds):
        for one in measured:
            serve.measure(one, requests, args, run.console)
            if num_errors := one.rounds[-1]["num_errors"]:
                raise BenchmarkError(f"{one.name}: {num_errors} requests failed")
    return {one.name: [_short(figures) for figures in one.rounds] for one in measured}


def _configuration(name: str, overrides: dict[str, Any], scratch: Path) -> serve.Configuration:
    log = scratch / f"real-{name.replace(' ', '-')}.log"
    return serve.Configuration(name, lambda: ServerProcess(arguments(overrides), log))


def arguments(overrides: dict[str, Any]) -> list[str]:
    """Of `flowkv serve`: the instances, then the rest by its key."""
    counts = [text for key in ("prefill", "decode", "mixed") if key in overrides for text in _option(overrides, key)]
    rest = [text for key, value in overrides.items() if "." in key for text in ("--set", f"{key}={value}")]
    return [*counts, *rest]


def _option(overrides: dict[str, Any], key: str) -> tuple[str, str]:
    return f"--{key}", str(overrides[key])


def _short(figures: Row) -> Row:
    return {key: figures[key] for key in ("num_requests", "duration_s", *(spread for spread, _ in FIGURES.values()))}


# --- simulated -----------------------------------------------------------------------------------------------------


def simulated_rows(path: Path, overrides: dict[str, Any], requests: Sequence[TraceRequest], rounds: int) -> list[Row]:
    """One for each seed of the steps' noise."""
    of_machine = {**overrides, **read_profile(path).overrides, "simulate.cost": str(path)}
    config = load_config(None, of_machine)
    return [short_figures(simulate(config, requests, seed=seed), Slo()) for seed in range(rounds)]


# --- what it says --------------------------------------------------------------------------------------------------


def compare(real: dict[str, list[Row]], simulated: dict[str, list[Row]], first: str, second: str) -> Row:
    """For each figure the ratio of two clusters, real and simulated, and whether both say that the same is lower.

    Where the rounds of the two overlap, or one round is all there is, the real machine does not say which: then
    `agrees` is None.
    """
    row: Row = {"first": first, "second": second}
    for label, (spread, at) in FIGURES.items():
        value = summary.point(spread, at)
        mine, theirs = (summary.over_seeds(real[name], value) for name in (first, second))
        found = summary.mean_of(simulated[first], value) / summary.mean_of(simulated[second], value)
        is_clear = min(len(real[first]), len(real[second])) > 1 and (mine.high < theirs.low or theirs.high < mine.low)
        agrees = (mine.mean < theirs.mean) == (found < 1) if is_clear else None
        row[label] = {"real": mine.mean / theirs.mean, "simulated": found, "agrees": agrees}
    return row


def show(console: Console, results: Results) -> None:
    header = ("cluster", *(f"{label}\n{where}, ms" for label in FIGURES for where in ("real", "simulated")))
    rows = []
    for name in results["clusters"]:
        cells = [name]
        for spread, at in FIGURES.values():
            value = summary.point(spread, at)
            cells += [_range_ms(summary.over_seeds(results[kind][name], value)) for kind in ("real", "simulated")]
        rows.append(cells)
    print_table(console, header, rows, f"A shifting load of {results['num_requests']} requests on two instances")
    for pair in results["pairs"]:
        for label in FIGURES:
            one = pair[label]
            says = {True: "same order", False: "[bold red]OTHER ORDER[/bold red]", None: "real rounds do not say"}
            console.print(
                f"{label}, {pair['first']} over {pair['second']}: real {one['real']:.3f}, simulated"
                f" {one['simulated']:.3f}: {says[one['agrees']]}"
            )


def _range_ms(values: summary.Range) -> str:
    return f"{1e3 * values.mean:,.0f} ({1e3 * values.low:,.0f}..{1e3 * values.high:,.0f})"


def draw(results: Results) -> "Figure":
    figure, (row,) = plots.panels(1, len(FIGURES), 3.6, 3.2)
    names = list(results["clusters"])
    for axes, (label, (spread, at)) in zip(row, FIGURES.items(), strict=True):
        value = summary.point(spread, at)
        for shift, kind, color in ((-0.2, "real", "#1b7f5c"), (0.2, "simulated", "#93c6b2")):
            ranges = [summary.over_seeds(results[kind][name], value) for name in names]
            means = [1e3 * one.mean for one in ranges]
            spans = [[1e3 * (one.mean - one.low) for one in ranges], [1e3 * (one.high - one.mean) for one in ranges]]
            xs = [x + shift for x in range(len(names))]
            axes.bar(xs, means, 0.38, color=color, label=kind, yerr=spans, ecolor=plots.LIMIT)
        axes.set_xticks(range(len(names)), names)
        plots.label(axes, label, "", "ms" if axes is row[0] else "")
    plots.legend(figure, row[0])
    return figure
