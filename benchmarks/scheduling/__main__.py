"""`python -m benchmarks.scheduling shift|traces|longbench|heterogeneous|speed|real|all`: a JSON, a table, a picture.

With `--redraw` the tables and pictures of what was measured before are made again from its JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.report import ROOT, write_report
from benchmarks.scheduling import heterogeneous, longbench, plots, real, shift, speed, traces
from benchmarks.scheduling.cases import Run, significant
from benchmarks.spawn import exit_on_sigterm
from flowkv.errors import FlowKVError
from flowkv.sim.plots import require_matplotlib

PARTS: dict[str, ModuleType] = {part.NAME: part for part in (shift, traces, longbench, heterogeneous, speed, real)}


def measure(part: ModuleType, run: Run, out: Path) -> None:
    """Write `sched-NAME.json` and `.png`, and print the tables."""
    began_s = time.perf_counter()
    results = part.measure(run)
    elapsed_s = round(time.perf_counter() - began_s, 1)
    write_report(out / f"sched-{part.NAME}.json", {"quick": run.quick, "elapsed_s": elapsed_s, **significant(results)})
    present(part, run.console, out)


def present(part: ModuleType, console: Console, out: Path) -> None:
    """Tables and picture of what is in the JSON. Raises BenchmarkError where there is none."""
    path = out / f"sched-{part.NAME}.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path}: {error}") from error
    part.show(console, results)
    plots.save(part.draw(results), path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png').name}\n", highlight=False, soft_wrap=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--quick", action="store_true", help="a few short runs, to see that it works")
    parser.add_argument("--seeds", type=_positive, default=5, help="of loads that are drawn at random")
    parser.add_argument("--rounds", type=_positive, default=3, help="on each real server")
    parser.add_argument("--processes", type=_positive, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--profile", type=Path, help="of this machine, by flowkv profile --concurrency 2 (part: real)")
    parser.add_argument(
        "--large-requests", type=_positive, default=1_000_000, metavar="N", help="on 1,024 instances (part: speed)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: tables and pictures of what there is")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main() -> None:
    exit_on_sigterm()
    args = parse_arguments()
    console = Console() if sys.stdout.isatty() else Console(width=180)
    run = Run(console, args.quick, args.seeds, args.processes, args.rounds, args.profile, args.out, args.large_requests)
    try:
        require_matplotlib()
        for part in PARTS.values() if args.part == "all" else (PARTS[args.part],):
            if args.redraw:
                present(part, console, args.out)
            else:
                measure(part, run, args.out)
    except (BenchmarkError, FlowKVError) as error:
        sys.exit(f"benchmarks.scheduling: {error}")


if __name__ == "__main__":
    main()
