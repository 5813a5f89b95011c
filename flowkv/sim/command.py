"""`flowkv simulate`: its options, and what happens between them and the report."""

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowkv.config import ClusterConfig, load_config
from flowkv.errors import ConfigError
from flowkv.sim.options import add_cluster, add_workload, build_workload, overrides

if TYPE_CHECKING:
    from flowkv.sim.chrome import Recorder
    from flowkv.sim.figures import SimResult
    from flowkv.sim.workload import TraceRequest


@dataclass(slots=True)
class Timed:
    """A simulated run, and how long it took on the real clock."""

    result: "SimResult"
    wall_s: float

    @property
    def speed(self) -> float:
        """Simulated seconds in a real one."""
        return self.result.duration_s / self.wall_s


def simulate_command(args: argparse.Namespace) -> None:
    """Raises FlowKVError, before anything is simulated, for whatever cannot be."""
    if args.list:
        return show_cost_models()
    config = load_config(args.config, overrides(args), args.set)
    _check_outputs(args)
    _check_slo(config)
    requests, num_requests = build_workload(args)
    recorder = _recorder(args)
    timed = _run(config, requests, num_requests, recorder, args)
    _tell(timed, config, args)
    _write(timed, config, recorder, args)
    return None


# --- before --------------------------------------------------------------------------------------------------------


def show_cost_models() -> None:
    from flowkv.sim.costs import list_cost_models

    for model in list_cost_models():
        print(f"{model.name}\n    {model.source}")


def _check_outputs(args: argparse.Namespace) -> None:
    """What would fail after the run, fails before it."""
    if args.plots:
        from flowkv.sim.plots import require_matplotlib

        if args.out is None:
            raise ConfigError("--plots needs --out FOLDER to write them to")
        require_matplotlib()
    if args.chrome_trace is not None and args.chrome_trace.is_dir():
        raise ConfigError(f"{args.chrome_trace}: cannot be written: it is a folder")
    for folder in filter(None, (args.out, args.chrome_trace and args.chrome_trace.parent)):
        check_writable(folder)


def check_writable(folder: Path) -> None:
    """Raises ConfigError where files cannot be made in it, or it cannot be made."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"{existing}: cannot be written: not a folder in which files can be made")


def _check_slo(config: ClusterConfig) -> None:
    """Raises ConfigError for bounds that no instance could keep, even with nothing else to do."""
    from flowkv.sim.costs import StepShape
    from flowkv.sim.run import cost_models

    costs = cost_models(config)
    least = {
        "slo.ttft_s": (config.slo.ttft_s, StepShape(1, 1, 0, 0, 1)),
        "slo.tpot_s": (config.slo.tpot_s, StepShape(0, 0, 1, 2, 1)),
    }
    for key, (bound_s, shape) in least.items():
        fastest = min(costs, key=lambda cost: cost.step_s(shape))
        if bound_s is not None and bound_s < fastest.step_s(shape):
            raise ConfigError(
                f"{key} of {bound_s:g} s cannot be kept: the shortest step of {fastest.name} takes"
                f" {fastest.step_s(shape):.3g} s"
            )


# --- the run -------------------------------------------------------------------------------------------------------


def _recorder(args: argparse.Namespace) -> "Recorder | None":
    if args.chrome_trace is None:
        return None
    from flowkv.sim.chrome import Recorder

    return Recorder()


def _run(
    config: ClusterConfig,
    requests: "Iterable[TraceRequest]",
    num_requests: int,
    recorder: "Recorder | None",
    args: argparse.Namespace,
) -> Timed:
    from flowkv.sim.run import simulate

    with _progress(num_requests) as on_progress:
        start_s = time.perf_counter()
        result = simulate(
            config, requests, seed=args.seed, coalesce=not args.single_steps, on_progress=on_progress, recorder=recorder
        )
        return Timed(result, time.perf_counter() - start_s)


@contextmanager
def _progress(num_requests: int) -> Iterator[Callable[[float, int], None]]:
    """A bar on a terminal, nothing elsewhere; call the context's value with (simulated seconds, requests done)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    start_s = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=num_requests)

        def show(simulated_s: float, num_done: int) -> None:
            wall_s = time.perf_counter() - start_s
            text = f"{simulated_s:,.0f} s simulated in {wall_s:,.1f} s: {simulated_s / wall_s:,.0f} times real time"
            bar.update(task, completed=num_done, description=text)

        yield show


# --- after ---------------------------------------------------------------------------------------------------------


def _tell(timed: Timed, config: ClusterConfig, args: argparse.Namespace) -> None:
    from rich.console import Console

    from flowkv.sim import report
    from flowkv.sim.figures import Slo

    slo = Slo(config.slo.ttft_s, config.slo.tpot_s)
    name = f"{describe(config)}, seed {args.seed}"
    notes = [
        f"role flips: {len(timed.result.flips)}",
        f"simulated in {timed.wall_s:.2f} s: {timed.speed:,.0f} times real time",
    ]
    report.print_summary(Console(), name, report.summary(timed.result, slo), slo, notes)


def describe(config: ClusterConfig) -> str:
    """`4 prefill, 4 decode, roles flexible, on llama-3.1-8b/h100`."""
    counts = {"prefill": config.prefill, "decode": config.decode, "mixed": config.mixed}
    instances = ", ".join(f"{count} {role}" for role, count in counts.items() if count)
    cost = config.simulate.cost
    hardware = cost if isinstance(cost, str) else ", ".join(dict.fromkeys(cost))
    return f"{instances}, roles {config.scheduling.roles}, on {hardware}"


def _write(timed: Timed, config: ClusterConfig, recorder: "Recorder | None", args: argparse.Namespace) -> None:
    written: list[Path] = []
    if args.out is not None:
        written.append(_write_report(timed, config, args))
    if args.plots:
        from flowkv.sim.figures import Slo
        from flowkv.sim.plots import write_plots

        written += write_plots(args.out, timed.result, Slo(config.slo.ttft_s, config.slo.tpot_s))
    if recorder is not None:
        from flowkv.sim.chrome import write_chrome_trace

        write_chrome_trace(args.chrome_trace, timed.result, recorder)
        written.append(args.chrome_trace)
    for path in written:
        print(f"wrote {path}")


def _write_report(timed: Timed, config: ClusterConfig, args: argparse.Namespace) -> Path:
    from flowkv import __version__
    from flowkv.sim import report
    from flowkv.sim.figures import Slo

    result: SimResult = timed.result
    options = {name: value for name, value in vars(args).items() if name != "command"}
    path: Path = args.out / "report.json"
    content = {
        "version": __version__,
        "wall_s": timed.wall_s,  # this line alone differs from one run to the next
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        "config": config,
        "figures": report.summary(result, Slo(config.slo.ttft_s, config.slo.tpot_s)),
        "counters": result.counters,
        "flips": result.flips,
        "samples": result.samples,
        "requests": report.request_columns(result.records),
    }
    report.write_json(path, content)
    return path


# --- options -------------------------------------------------------------------------------------------------------


def add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    simulate = commands.add_parser(
        "simulate",
        help="replay a trace on a simulated cluster, much faster than real time",
        description="Run a workload through the engines and the controller of flowkv serve, on a virtual clock: only "
        "the seconds of steps and transfers are modelled. The same command gives the same figures, bit for bit.",
        epilog="Options win over the configuration file, and --set over both. docs/simulation.md: what is modelled.",
    )
    simulate.set_defaults(command=simulate_command)
    add_workload(simulate)
    add_cluster(simulate)
    output = simulate.add_argument_group("output")
    output.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and the noise of steps (default: 0)")
    output.add_argument("--single-steps", action="store_true", help="no steps at a stretch: slower, the same figures")
    output.add_argument("--out", type=Path, metavar="FOLDER", help="for report.json and the plots")
    output.add_argument("--plots", action="store_true", help="load and latency as PNG; needs flowkv[plots]")
    output.add_argument("--chrome-trace", type=Path, metavar="FILE", help="every request's life, for ui.perfetto.dev")
