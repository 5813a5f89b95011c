"""Drive a server with a trace, a rate or a number of requests at once, and measure what its clients see.

    python -m benchmarks.serve --url http://127.0.0.1:8000 --rate 4 --num-requests 100
    python -m benchmarks.serve --serve '--prefill 1 --decode 1' --serve '--mixed 2' --rounds 3 \\
        --trace benchmarks/data/mooncake.jsonl --scale-length 0.05 --speedup 2 --slo-ttft-s 1 --slo-tpot-s 0.05

With --serve it starts and stops its own servers; several are compared in turns, so that a machine that slows down
slows all of them. Requests go to /v1/completions with token ids, and every answer has the length that was asked for.
"""

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import BenchmarkError, scrape
from benchmarks.client import Answer, Client, gaps_s, run_of
from benchmarks.report import ROOT, write_results
from benchmarks.spawn import ServerProcess, exit_on_sigterm
from flowkv.errors import WorkloadError
from flowkv.sim import report, workload
from flowkv.sim.figures import Record, RunResult, Slo, figures, server_figures
from flowkv.sim.workload import Lengths, TraceRequest

Number = TypeVar("Number", int, float)


@dataclass(slots=True)
class Configuration:
    """One server to measure, and what all rounds on it have given so far."""

    name: str
    connect: Callable[[], AbstractContextManager[str]]  # its URL, while the context lasts
    records: list[Record] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    client_cpu_s: float = 0.0
    max_late_s: float = 0.0
    counted: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    num_clipped: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """One run on one server; it began at `start_s` of the clock of its answers."""

    answers: list[Answer]
    start_s: float
    duration_s: float
    client_cpu_s: float
    counted: dict[str, float]


# --- sending -------------------------------------------------------------------------------------------------------


async def replay(
    client: Client,
    requests: Sequence[bytes],
    arrivals_s: Sequence[float],
    concurrency: int | None,
    on_done: Callable[[], None],
) -> list[Answer]:
    """Send every request at its time, or, with `concurrency`, as soon as fewer than that many are open."""
    gate = asyncio.Semaphore(concurrency or len(requests))
    start_s = time.perf_counter()

    async def send(request: bytes, arrival_s: float) -> Answer:
        due_s = start_s if concurrency else start_s + arrival_s
        await asyncio.sleep(due_s - time.perf_counter())
        async with gate:
            answer = await client.send(request)
        if not concurrency:
            answer.late_s = answer.sent_s - due_s
        on_done()
        return answer

    return await asyncio.gather(*map(send, requests, arrivals_s))


def encode(client: Client, requests: Sequence[TraceRequest], model: str, args: argparse.Namespace) -> list[bytes]:
    def body(index: int, request: TraceRequest) -> dict[str, object]:
        num_output = request.num_output_tokens
        return {
            "model": model,
            "prompt": workload.prompt_ids(request, index, args.vocab, args.seed),
            "max_tokens": num_output,
            "min_tokens": num_output,
            "ignore_eos": True,
            "skip_special_tokens": False,  # a token that shows no text would bring no event
            "temperature": args.temperature,
            "seed": args.seed + index,
        }

    return [client.encode("/v1/completions", body(i, request)) for i, request in enumerate(requests)]


def served_model(url: str) -> tuple[str, int | None]:
    """Name of the model and the tokens that one request may hold, where the server tells."""
    try:
        answer = httpx.get(f"{url}/v1/models", timeout=10.0)
        answer.raise_for_status()
        model = answer.json()["data"][0]
        return str(model["id"]), model.get("max_model_len")
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise BenchmarkError(f"{url}/v1/models: {error!r}") from error


def measure(
    configuration: Configuration, requests: Sequence[TraceRequest], args: argparse.Namespace, console: Console
) -> None:
    """One round on one server, added to what `configuration` holds."""
    with configuration.connect() as url:
        model, max_tokens = served_model(url)
        if max_tokens is not None:
            requests, configuration.num_clipped = workload.clipped(requests, max_tokens)
        client = Client(url, args.timeout_s)
        encoded = encode(client, requests, model, args)
        warmup = workload.synthetic(args.warmup, Lengths(64, 64), Lengths(8, 8), args.seed)
        asyncio.run(replay(client, encode(client, warmup, model, args), [0.0] * args.warmup, None, lambda: None))
        before = scrape.settled_counters(url)
        with _progress(console, configuration.name, len(requests)) as advance:
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            arrivals_s = [request.arrival_s for request in requests]
            answers = asyncio.run(replay(client, encoded, arrivals_s, args.concurrency, advance))
            duration_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        counted = scrape.difference(before, scrape.settled_counters(url))
    one = Round(answers, start_s, duration_s, cpu_s, counted)
    _add_round(configuration, one, _slo(args))


def _add_round(configuration: Configuration, one: Round, slo: Slo) -> None:
    run = run_of(one.answers, one.duration_s, one.start_s)
    configuration.rounds.append(figures(run, slo) | {"server": server_figures(one.counted)})
    configuration.records += run.records
    configuration.itl_s += gaps_s(one.answers)
    configuration.duration_s += run.duration_s
    configuration.client_cpu_s += one.client_cpu_s
    configuration.max_late_s = max([configuration.max_late_s, *(answer.late_s for answer in one.answers)])
    configuration.counted = scrape.add(configuration.counted, one.counted)


@contextmanager
def _progress(console: Console, name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere; call the context's value once a request."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)


# --- reporting -----------------------------------------------------------------------------------------------------


def _slo(args: argparse.Namespace) -> Slo:
    return Slo(args.slo_ttft_s, args.slo_tpot_s)


def summary(configuration: Configuration, slo: Slo) -> dict[str, Any]:
    run = RunResult(configuration.records, configuration.itl_s, configuration.duration_s)
    return {
        "name": configuration.name,
        **figures(run, slo),
        "num_clipped": configuration.num_clipped,
        "client_core_fraction": configuration.client_cpu_s / run.duration_s,
        "tokens_per_event": tokens_per_event(configuration),
        "max_late_s": configuration.max_late_s,
        "server": server_figures(configuration.counted),
        "errors": report.errors(run.records),
        "rounds": configuration.rounds,
        "requests": report.request_columns(run.records),
    }


def tokens_per_event(configuration: Configuration) -> float:
    """1 unless the server holds text back or makes several steps at a stretch."""
    begun = [record for record in configuration.records if record.error is None and record.ttft_s is not None]
    return sum(record.num_output_tokens for record in begun) / max(1, len(configuration.itl_s) + len(begun))


def notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What only a run with a real client has to say."""
    if result["tokens_per_event"] > 1.05:
        yield "ITL is of events, each of {tokens_per_event:.2f} tokens".format_map(result)
    if result["num_clipped"]:
        yield "{num_clipped} requests were cut to what the server takes".format_map(result)
    yield "client: {client_core_fraction:.0%} of a core, {max_late_s:.3f} s late at most".format_map(result)


# --- the program ---------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a server that runs already")
    where.add_argument("--serve", action="append", metavar="ARGS", help="`flowkv serve ARGS`; repeat it to compare")
    parser.add_argument("--rounds", type=_positive(int), default=1, help="runs on each server, in turns")
    load = parser.add_argument_group("workload")
    load.add_argument("--trace", type=Path, help="of Mooncake or Azure, gzipped or not")
    load.add_argument("--num-requests", type=_positive(int), help="the first so many; without a trace, 100")
    load.add_argument("--input-length", type=Lengths.parse, default=Lengths(64, 512), metavar="LOW[:HIGH]")
    load.add_argument("--output-length", type=Lengths.parse, default=Lengths(16, 64), metavar="LOW[:HIGH]")
    load.add_argument("--scale-length", type=_positive(float), default=1.0, help="all lengths times this")
    load.add_argument("--speedup", type=_positive(float), default=1.0, help="arrivals this many times as fast")
    when = load.add_mutually_exclusive_group()
    when.add_argument("--rate", type=_positive(float), help="Poisson arrivals a second (inf: all at once)")
    when.add_argument("--concurrency", type=_positive(int), help="this many requests open at a time")
    load.add_argument("--vocab", type=Lengths.parse, default=Lengths(100, 999), metavar="LOW:HIGH", help="prompt ids")
    load.add_argument("--temperature", type=float, default=0.0)
    load.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=4, help="short requests before the clock starts")
    parser.add_argument("--slo-ttft-s", type=_positive(float))
    parser.add_argument("--slo-tpot-s", type=_positive(float))
    parser.add_argument("--timeout-s", type=_positive(float), default=600.0, help="for one request")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "serve.json")
    return parser.parse_args(arguments)


def _positive(kind: type[Number]) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def build_workload(args: argparse.Namespace) -> list[TraceRequest]:
    """Raises WorkloadError for a trace that is broken, BenchmarkError for one that is too short."""
    if args.trace is None:
        requests = workload.synthetic(args.num_requests or 100, args.input_length, args.output_length, args.seed)
    else:
        requests = workload.read_trace(args.trace)
        if args.num_requests is not None and args.num_requests > len(requests):
            raise BenchmarkError(f"{args.trace} has {len(requests)} requests, fewer than {args.num_requests}")
        requests = requests[: args.num_requests]
    requests = workload.scaled(requests, args.scale_length, args.speedup)
    return requests if args.rate is None else workload.with_poisson_arrivals(requests, args.rate, args.seed)


def configurations(args: argparse.Namespace) -> list[Configuration]:
    if args.url is not None:
        url = args.url.rstrip("/")
        return [Configuration(url, lambda: nullcontext(url))]

    def server(number: int, text: str) -> Configuration:
        log = args.output.parent / f"serve-{number}.log"
        return Configuration(f"flowkv serve {text}", lambda: ServerProcess(shlex.split(text), log))

    return [server(number, text) for number, text in enumerate(args.serve)]


def run(args: argparse.Namespace, console: Console) -> int:
    requests = build_workload(args)
    measured = configurations(args)
    for _ in range(args.rounds):
        for configuration in measured:
            measure(configuration, requests, args, console)
    results = [summary(configuration, _slo(args)) for configuration in measured]
    for result in results:
        report.print_summary(console, result["name"], result, _slo(args), notes(result))
    write_results(console, args, {"configurations": results})
    return 1 if any(result["num_errors"] or result["num_refused"] for result in results) else 0


def main() -> None:
    exit_on_sigterm()
    try:
        sys.exit(run(parse_arguments(), Console()))
    except (BenchmarkError, WorkloadError) as error:
        sys.exit(f"benchmarks.serve: {error}")


if __name__ == "__main__":
    main()
