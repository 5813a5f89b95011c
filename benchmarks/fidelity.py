"""The same requests on the real runtime and in the simulator: how far apart are they?

    flowkv profile --concurrency 2 --out profile.json
    python -m benchmarks.fidelity --profile profile.json --prefill 1 --decode 1 \\
        --trace conversation_trace.jsonl 0.05 --trace azure_code.csv 0.25 --rate 3 --rate 6 --rate 9

Each trace comes with a factor for its lengths, and is sped up or slowed down to every rate (requests/s, on average). At
each rate it runs on a server `--repeats` times and in the simulator once; servers and rates take turns. Reported are
errors of the simulator against the mean of the real runs, and, beside them, of the real runs against each other: what
cannot be predicted. `median` is over requests: of |simulated - real| / real, each against the mean of its real runs.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks import BenchmarkError, serve
from benchmarks.report import ROOT, print_table, write_results
from benchmarks.spawn import ServerProcess, exit_on_sigterm
from flowkv.config import ClusterConfig, load_config
from flowkv.errors import FlowKVError
from flowkv.sim import workload
from flowkv.sim.costs import read_profile
from flowkv.sim.figures import Record, RunResult, Slo, figures
from flowkv.sim.run import simulate
from flowkv.sim.workload import TraceRequest

LATENCIES = ("ttft_s", "tpot_s", "e2el_s")
POINTS = ("mean", "p50", "p99")
METRICS = tuple(f"{latency} {point}" for latency in LATENCIES for point in (*POINTS, "median"))


class Load(NamedTuple):
    """One workload: `requests` of a trace at one rate."""

    name: str
    rate: float
    requests: list[TraceRequest]


# --- comparing -----------------------------------------------------------------------------------------------------


def comparison(predicted: RunResult, real: Sequence[RunResult]) -> dict[str, float]:
    """Relative errors of `predicted` against the mean of the real runs; with a sign, but for the median's."""
    ours = _summary(predicted)
    theirs = [_summary(run) for run in real]
    errors = {key: ours[key] / statistics.fmean(run[key] for run in theirs) - 1.0 for key in ours}
    return errors | {f"{name} median": request_error(name, predicted, real) for name in LATENCIES}


def repeat_difference(real: Sequence[RunResult]) -> dict[str, float]:
    """The largest |error| of one real run against another; for the medians, the largest of theirs."""
    differences = [comparison(a, [b]) for a, b in combinations(real, 2)]
    return {key: max(abs(one[key]) for one in differences) for key in differences[0]} if differences else {}


def request_error(name: str, predicted: RunResult, real: Sequence[RunResult]) -> float:
    """Median over requests of |predicted - real| / real; of those that have the figure in every run."""
    errors = []
    for ours, *theirs in zip(predicted.records, *(run.records for run in real), strict=True):
        seconds = [getattr(record, name) for record in theirs]
        # All tokens of an answer may come in one event: then there is no TPOT to err from.
        if getattr(ours, name) is not None and None not in seconds and statistics.fmean(seconds) > 0:
            errors.append(abs(float(getattr(ours, name)) / statistics.fmean(seconds) - 1.0))
    return statistics.median(errors)


def _summary(run: RunResult) -> dict[str, float]:
    """By metric. BenchmarkError where a request failed: nothing could be compared."""
    if failed := [record.error for record in run.records if record.error is not None]:
        raise BenchmarkError(f"{len(failed)} requests failed: {failed[0]}")
    result = figures(run, Slo())
    values = {f"{name} {point}": result[name][point] for name in LATENCIES for point in POINTS}
    return values | {"output_tokens_per_s": result["output_tokens_per_s"]}


# --- running -------------------------------------------------------------------------------------------------------


def loads(args: argparse.Namespace, max_total_tokens: int) -> list[Load]:
    """Every trace at every rate."""
    result = []
    for path, scale in args.trace:
        requests = workload.read_trace(Path(path))
        if len(requests) < args.num_requests:
            raise BenchmarkError(f"{path} has {len(requests)} requests, fewer than {args.num_requests}")
        requests = requests[: args.num_requests]
        natural_rate = len(requests) / requests[-1].arrival_s
        for rate in args.rate:
            scaled = workload.scaled(requests, float(scale), rate / natural_rate)
            result.append(Load(Path(path).name, rate, workload.clipped(scaled, max_total_tokens)[0]))
    return result


def run_real(load: Load, args: argparse.Namespace, number: int, console: Console) -> RunResult:
    """On a server of its own."""
    arguments = _serve_arguments(args)
    log = args.output.parent / f"fidelity-{number}.log"
    configuration = serve.Configuration("flowkv serve", lambda: ServerProcess(arguments, log))
    options = serve.parse_arguments(["--serve", " ".join(arguments), "--seed", str(args.seed)])
    serve.measure(configuration, load.requests, options, console)
    return RunResult(configuration.records, configuration.itl_s, configuration.duration_s)


def run_simulated(load: Load, config: ClusterConfig, args: argparse.Namespace) -> RunResult:
    return simulate(config, load.requests, seed=args.seed)


def simulated_config(args: argparse.Namespace) -> ClusterConfig:
    """The cluster of `_serve_arguments` on the machine of the profile."""
    profile = read_profile(args.profile)
    overrides: dict[str, Any] = {name: getattr(args, name) for name in ("prefill", "decode", "mixed")}
    overrides |= profile.overrides | {"simulate.cost": str(args.profile), "scheduling.roles": args.roles}
    return load_config(None, overrides, args.set)


def _serve_arguments(args: argparse.Namespace) -> list[str]:
    counts = [f"--{name}={getattr(args, name)}" for name in ("prefill", "decode", "mixed")]
    settings = [word for setting in args.set for word in ("--set", setting)]
    return [*counts, "--roles", args.roles, *settings]


def compare(
    loads: Sequence[Load], repeats: int, real: Callable[[Load, int], RunResult], simulated: Callable[[Load], RunResult]
) -> list[dict[str, Any]]:
    """One row a load. All loads have had one real run before any has its second."""
    runs = [[real(load, number) for load in loads] for number in range(repeats)]
    rows = []
    for i, load in enumerate(loads):
        mine, theirs = simulated(load), [runs[number][i] for number in range(repeats)]
        rows.append(
            {
                "trace": load.name,
                "rate": load.rate,
                "num_requests": len(load.requests),
                "errors": comparison(mine, theirs),
                "repeats": repeat_difference(theirs),
                "simulated": _summary(mine),
                "real": [_summary(run) for run in theirs],
                "requests": {"simulated": _columns(mine.records), "real": [_columns(run.records) for run in theirs]},
            }
        )
    return rows


def _columns(records: Sequence[Record]) -> dict[str, list[float | None]]:
    return {name: [getattr(record, name) for record in records] for name in LATENCIES}


# --- reporting -----------------------------------------------------------------------------------------------------


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Simulator against real, and (in brackets) real against real."""
    for metrics in (METRICS[:4], METRICS[4:8], (*METRICS[8:], "output_tokens_per_s")):
        body = [
            [f"{row['trace'][:12]} {row['rate']:g}/s", *(_cell(row, metric) for metric in metrics)] for row in rows
        ]  # fmt: skip
        print_table(console, ["", *map(_title, metrics)], body)
    worst = {metric: max(abs(row["errors"][metric]) for row in rows) for metric in METRICS if metric.endswith("mean")}
    console.print(", ".join(f"{name} {error:.1%}" for name, error in worst.items()) + " at worst", highlight=False)


def _title(metric: str) -> str:
    return metric.replace("_s ", " ").replace("output_tokens_per_s", "tokens/s").replace("median", "request")


def _cell(row: Mapping[str, Any], metric: str) -> str:
    repeats = f" ({row['repeats'][metric]:.1%})" if row["repeats"] else ""
    return f"{row['errors'][metric]:+.1%}{repeats}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True, help="of this machine, by flowkv profile")
    parser.add_argument("--trace", nargs=2, action="append", required=True, metavar=("FILE", "FACTOR"))
    parser.add_argument("--rate", type=float, action="append", required=True, help="requests/s; repeat it")
    parser.add_argument("--num-requests", type=int, default=500, help="the first so many of each trace")
    parser.add_argument("--repeats", type=int, default=2, help="real runs of each load")
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--mixed", type=int, default=0)
    parser.add_argument("--roles", default="fixed", help="fixed or flexible")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for both, as flowkv serve's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "fidelity.json")
    return parser.parse_args(arguments)


def main() -> None:
    exit_on_sigterm()
    args, console = parse_arguments(), Console()
    try:
        config = simulated_config(args)
        todo = loads(args, read_profile(args.profile).max_model_tokens)
        rows = compare(
            todo, args.repeats, lambda load, number: run_real(load, args, number, console),
            lambda load: run_simulated(load, config, args),
        )  # fmt: skip
    except (BenchmarkError, FlowKVError) as error:
        sys.exit(f"benchmarks.fidelity: {error}")
    print_rows(console, rows)
    write_results(console, args, {"rows": rows})


if __name__ == "__main__":
    main()
