"""What a kill costs a client: streams under a steady load, while instances and the controller are killed or stopped.

    python -m benchmarks.chaos                             # all of it, less than six minutes
    python -m benchmarks.chaos --only calm killed          # some of it
    python -m benchmarks.chaos --only calm killed --seconds 10 --calm-seconds 5

Two prefill and two decode instances of toys (a step takes 10 ms), or of the bundled model. Each event of each stream is
compared, as it comes, with what the undisturbed server has said at that place.

    calm           toys left alone
    killed         toys: kill -9 of a random one every --every seconds, and of the controller once
    stopped        toys: SIGSTOP of a random one, SIGCONT 0.1 to 2 s later
    model-calm     the bundled model left alone
    model-killed   kill -9 of a random one --rest seconds after its last victim's successor is in service, and of the
                   controller once

A request is hit where it had to be placed again: an instance that held it died, or the controller, which had not placed
it yet.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.chaos.bodies import bundled_bodies, toy_bodies
from benchmarks.chaos.havoc import Chaos, Havoc, killing, killing_in_turn, pausing
from benchmarks.chaos.phases import Contender, Phase, measure
from benchmarks.report import ROOT, print_table, write_results
from benchmarks.spawn import exit_on_sigterm

# Prompts take several steps, and pools (5,456 tokens) hold what there is also while one instance is down.
TOYS = "--toy --prefill 2 --decode 2 --set toy_step_s=0.01 --set engine.max_batch_tokens=64 --kv-memory 256KiB"
MODEL = "--prefill 2 --decode 2 --threads 1 --dtype float32 --set engine.max_batch_tokens=128"
PAUSES_S = (0.1, 0.25, 0.5, 1.0, 2.0)
CALM = {"calm": "calm", "killed": "calm", "stopped": "calm", "model-calm": "model-calm", "model-killed": "model-calm"}


def waiting(seconds: float) -> Havoc:
    async def havoc(chaos: Chaos) -> None:
        await asyncio.sleep(seconds)

    return havoc


def phases(args: argparse.Namespace) -> list[Phase]:
    toys = Contender(args.toys, toy_bodies(48, args.seed), concurrency=args.clients)
    model = Contender(args.model, list(bundled_bodies(24, args.seed)), concurrency=args.model_clients)
    all_phases = [
        Phase("calm", toys, waiting(args.calm_seconds)),
        Phase("killed", toys, killing(args.seconds, args.every)),
        Phase("stopped", toys, pausing(args.pauses, PAUSES_S)),
        Phase("model-calm", model, waiting(args.calm_seconds)),
        Phase("model-killed", model, killing_in_turn(args.model_kills, args.rest)),
    ]
    return [phase for phase in all_phases if phase.name in args.only]


def with_ratios(results: Sequence[dict[str, Any]]) -> None:
    """To each phase its throughput over that of the same server left alone, where that was measured."""
    rates = {result["name"]: result["output_tokens_per_s"] for result in results}
    for result in results:
        calm = rates.get(CALM[result["name"]])
        result["throughput_ratio"] = None if calm is None else result["output_tokens_per_s"] / calm


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """A table of toys and one of the model, with a column for each phase."""
    for calm in ("calm", "model-calm"):
        if shown := [result for result in results if CALM[result["name"]] == calm]:
            columns = [column(result) for result in shown]
            rows = [[name, *(one[name] for one in columns)] for name in columns[0]]
            print_table(console, ("", *(result["name"] for result in shown)), rows, "ms: p50, p99, max; s: p50, max")
    for result in results:
        for problem in result["problems"]:
            console.print(f"{result['name']}: {problem}", highlight=False, markup=False)


def column(result: dict[str, Any]) -> dict[str, str]:
    gaps, replaced, ratio = result["longest_gap_s"], result["replaced_s"], result["throughput_ratio"]
    return {
        "requests": str(result["num_requests"]),
        "whole, equal texts": str(result["num_equal"]),
        "whole, other texts": str(result["num_differing"]),
        "instances killed": str(result["num_kills"]),
        "controllers killed": str(result["num_controller_kills"]),
        "instances stopped": str(result["num_pauses"]),
        "hit (at most)": f"{result['num_hit']} ({max(map(int, result['hits']), default=0)} times)",
        "longest gap, hit, ms": milliseconds(gaps["hit"]),
        "longest gap, others, ms": milliseconds(gaps["others"]),
        "TTFT, hit, ms": milliseconds(result["ttft_s"]["hit"]),
        "TTFT, others, ms": milliseconds(result["ttft_s"]["others"]),
        "output tokens/s": f"{result['output_tokens_per_s']:.0f}",
        "of those left alone": "-" if ratio is None else f"{ratio:.2f}",
        "replaced after, s": "-" if replaced is None else f"{replaced['p50']:.2f}, {replaced['max']:.2f}",
        "tokens computed again": f"{result['num_recovered_tokens']:.0f}",
        "left": "nothing" if is_clean(result) else str({name: left for name, left in result["left"].items() if left}),
    }


def milliseconds(summary: dict[str, float] | None) -> str:
    return "-" if summary is None else ", ".join(f"{summary[name] * 1000:.0f}" for name in ("p50", "p99", "max"))


def is_clean(result: dict[str, Any]) -> bool:
    return not any(result["left"].values())


def is_whole(result: dict[str, Any]) -> bool:
    return bool(result["num_equal"] == result["num_requests"])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CALM, default=list(CALM), metavar="PHASE", help=", ".join(CALM))
    parser.add_argument("--toys", default=TOYS, metavar="ARGS", help="`flowkv serve ARGS`")
    parser.add_argument("--model", default=MODEL, metavar="ARGS", help="likewise, of the phases with a model")
    parser.add_argument("--clients", type=int, default=16, help="of toys; each asks again when it has its answer")
    parser.add_argument("--model-clients", type=int, default=8)
    parser.add_argument("--calm-seconds", type=float, default=20.0, help="of each phase without havoc")
    parser.add_argument("--seconds", type=float, default=60.0, help="in which toys are killed")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two kills of toys")
    parser.add_argument("--pauses", type=int, default=25, help="of toys, 0.1 to 2 s each")
    parser.add_argument("--model-kills", type=int, default=4)
    parser.add_argument("--rest", type=float, default=10.0, help="seconds from a successor to the next kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "chaos.json")
    return parser.parse_args(arguments)


def main() -> None:
    args, console = parse_arguments(), Console()
    exit_on_sigterm()
    results = []
    try:
        for phase in phases(args):
            console.print(f"{phase.name} ...", highlight=False)
            results.append(measure(phase, args.seed, args.output.parent / f"chaos-{phase.name}.log"))
    except BenchmarkError as error:
        sys.exit(f"benchmarks.chaos: {error}")
    with_ratios(results)
    show(console, results)
    write_results(console, args, {"phases": results})
    if not all(is_whole(result) and is_clean(result) for result in results):
        sys.exit("benchmarks.chaos: not every request has its whole answer, or something is left")


if __name__ == "__main__":
    main()
