"""What a server with an SLO and admission does at ten times the rate that it can sustain, and after it.

    python -m benchmarks.overload                      # a minute of it, on toy instances
    python -m benchmarks.overload --seconds 10 --sweep-seconds 5

First the capacity is measured (clients that ask without a pause), then a sweep of rates around it: the highest one
that keeps the SLO for 99 % of its requests is *sustainable*, the best goodput of any is the *peak*. Then `--times` the
sustainable rate, and without a pause `--after` of it again, to see how long the overload lasts after its end.
"""

import argparse
import asyncio
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.client import Answer, Client, run_of
from benchmarks.open_loop import Shape, arrive, bodies, capacity, poisson_s
from benchmarks.report import ROOT, print_table, summarize, write_results
from benchmarks.spawn import ServerProcess, exit_on_sigterm
from flowkv.sim.figures import Slo, figures

SERVE = (
    "--toy --prefill 1 --decode 1 --set toy_step_s=0.02 --set engine.max_choices=8 --set engine.max_batch_tokens=128 "
    "--slo-ttft 1 --slo-tpot 0.05 --admission"
)
SLO = Slo(1.0, 0.05)
SHAPE = Shape(num_prompt=64, num_output=32)
SWEEP = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)  # of the capacity
SUSTAINED_FRACTION = 0.99  # of the requests of a sustainable rate keep the SLO
TURNED_AWAY = (429, 503)


def run_at(client: Client, rate: float, seconds: float, seed: int) -> list[Answer]:
    arrivals_s = poisson_s(rate, seconds, seed)
    return asyncio.run(arrive(client, bodies(client, SHAPE, len(arrivals_s), seed), arrivals_s))


def at_rate(answers: Sequence[Answer], rate: float, seconds: float) -> dict[str, Any]:
    """The figures of one rate. Goodput is of the time in which requests came."""
    statuses = Counter(answer.status for answer in answers)
    refusal_s = [answer.finished_s - answer.sent_s for answer in answers if answer.status in TURNED_AWAY]
    return {
        "rate_per_s": rate,
        **figures(run_of(answers, seconds, min(answer.sent_s for answer in answers)), SLO),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "num_without_retry_after": sum(a.status in TURNED_AWAY and a.retry_after is None for a in answers),
        "refusal_s": summarize(refusal_s),
        "max_late_s": max(answer.late_s for answer in answers),
        "errors": Counter(a.error for a in answers if a.error and a.status not in TURNED_AWAY).most_common(5),
    }


def recovery_s(answers: Sequence[Answer], end_s: float) -> float:
    """From the overload's end to the arrival of the last request that missed the SLO or was refused; 0 for none."""
    missed = [a.sent_s - end_s for i, a in enumerate(answers) if not SLO.holds(a.record(i))]
    return max(missed, default=0.0)


def overloaded(
    client: Client, sustainable: float, times: float, seconds: float, after: float, after_seconds: float, seed: int
) -> dict[str, Any]:
    """The overload and what follows, as one run, so that there is no pause in between."""
    during_s = poisson_s(times * sustainable, seconds, seed)
    after_s = [seconds + at_s for at_s in poisson_s(after * sustainable, after_seconds, seed + 1)]
    requests = bodies(client, SHAPE, len(during_s) + len(after_s), seed + 2)
    answers = asyncio.run(arrive(client, requests, during_s + after_s))
    start_s = answers[0].sent_s - answers[0].late_s - during_s[0]
    during, following = answers[: len(during_s)], answers[len(during_s) :]
    return {
        "during": at_rate(during, times * sustainable, seconds),
        "after": at_rate(following, after * sustainable, after_seconds),
        "recovery_s": recovery_s(following, start_s + seconds),
    }


def measure(client: Client, args: argparse.Namespace) -> dict[str, Any]:
    most = asyncio.run(capacity(client, SHAPE, args.sweep_seconds, args.seed))
    sweep = []
    for number, fraction in enumerate(SWEEP):
        rate = fraction * most
        answers = run_at(client, rate, args.sweep_seconds, args.seed + number)
        sweep.append(at_rate(answers, rate, args.sweep_seconds))
    kept = [result["rate_per_s"] for result in sweep if result["good_fraction"] >= SUSTAINED_FRACTION]
    if not kept:
        raise BenchmarkError("no rate keeps the SLO: is the machine busy?")
    peak = max(result["goodput_per_s"] for result in sweep)
    result = overloaded(client, max(kept), args.times, args.seconds, args.after, args.after_seconds, args.seed + 100)
    return {
        "capacity_per_s": most,
        "sustainable_per_s": max(kept),
        "peak_goodput_per_s": peak,
        "goodput_fraction": result["during"]["goodput_per_s"] / peak,
        "sweep": sweep,
        **result,
    }


def show(console: Console, result: dict[str, Any]) -> None:
    rows = [row(f"{one['rate_per_s'] / result['sustainable_per_s']:.2f}", one) for one in result["sweep"]]
    rows += [row("overload", result["during"]), row("after", result["after"])]
    header = ("of sustain-\nable", "\nrequests/s", "\ngood/s", "\ngood", "\nrefused", "refusal\np99 ms", "TTFT\np99 s")
    print_table(console, header, rows, "requests of 64 + 32 tokens; good is within 1 s to the first token, 50 ms each")
    console.print(
        f"goodput under overload is {result['goodput_fraction']:.0%} of its peak; "
        f"{result['recovery_s']:.1f} s after the end all is well again",
        highlight=False,
    )  # fmt: skip


def row(name: str, one: dict[str, Any]) -> list[str]:
    refusal, ttft = one["refusal_s"], one["ttft_s"]
    return [
        name,
        f"{one['rate_per_s']:.1f}",
        f"{one['goodput_per_s']:.1f}",
        f"{one['good_fraction']:.1%}",
        str(sum(count for status, count in one["statuses"].items() if int(status) in TURNED_AWAY)),
        "-" if refusal is None else f"{refusal['p99'] * 1000:.1f}",
        "-" if ttft is None else f"{ttft['p99']:.2f}",
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", default=SERVE, metavar="ARGS", help="`flowkv serve ARGS`")
    parser.add_argument("--times", type=float, default=10.0, help="the sustainable rate")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--sweep-seconds", type=float, default=20.0, help="of each rate of the sweep")
    parser.add_argument("--after", type=float, default=0.8, help="of the sustainable rate, after the overload")
    parser.add_argument("--after-seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "overload.json")
    return parser.parse_args(arguments)


def main() -> None:
    args, console = parse_arguments(), Console()
    exit_on_sigterm()
    try:
        with ServerProcess(shlex.split(args.serve), args.output.parent / "overload.log") as url:
            result = measure(Client(url, timeout_s=60.0), args)
    except BenchmarkError as error:
        sys.exit(f"benchmarks.overload: {error}")
    show(console, result)
    write_results(console, args, result)


if __name__ == "__main__":
    main()
