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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import BenchmarkError, scrape, workload
from benchmarks.client import Client
from benchmarks.figures import Record, Slo, figures
from benchmarks.report import ROOT, print_table, write_report
from benchmarks.spawn import ServerProcess, exit_on_sigterm
from benchmarks.workload import Lengths, TraceRequest

Number = TypeVar("Number", int, float)


@dataclass(slots=True)
class Configuration:
    """One server to measure, and what all rounds on it have given so far."""

    name: str
    connect: Callable[[], AbstractContextManager[str]]  # its URL, while the context lasts
    records: list[Record] = field(default_factory=list)
    duration_s: float = 0.0
    client_cpu_s: float = 0.0
    counted: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    num_clipped: int = 0


# --- sending -------------------------------------------------------------------------------------------------------


async def replay(
    client: Client,
    requests: Sequence[bytes],
    arrivals_s: Sequence[float],
    concurrency: int | None,
    on_done: Callable[[], None],
) -> list[Record]:
    """Send every request at its time, or, with `concurrency`, as soon as fewer than that many are open."""
    gate = asyncio.Semaphore(concurrency or len(requests))
    start_s = time.perf_counter()

    async def send(request: bytes, arrival_s: float) -> Record:
        due_s = start_s if concurrency else start_s + arrival_s
        await asyncio.sleep(due_s - time.perf_counter())
        async with gate:
            record = await client.send(request)
        if not concurrency:
            record.late_s = record.sent_s - due_s
        on_done()
        return record

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
            records = asyncio.run(replay(client, encoded, arrivals_s, args.concurrency, advance))
            duration_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        counted = scrape.difference(before, scrape.settled_counters(url))
    _add_round(configuration, records, duration_s, cpu_s, counted, args)


def _add_round(
    configuration: Configuration,
    records: list[Record],
    duration_s: float,
    cpu_s: float,
    counted: dict[str, float],
    args: argparse.Namespace,
) -> None:
    configuration.rounds.append(figures(records, duration_s, _slo(args)) | {"server": scrape.server_figures(counted)})
    configuration.records += records
    configuration.duration_s += duration_s
    configuration.client_cpu_s += cpu_s
    configuration.counted = scrape.add(configuration.counted, counted)


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
    return {
        "name": configuration.name,
        **figures(configuration.records, configuration.duration_s, slo),
        "num_clipped": configuration.num_clipped,
        "client_core_fraction": configuration.client_cpu_s / configuration.duration_s,
        "server": scrape.server_figures(configuration.counted),
        "errors": sorted({record.error for record in configuration.records if record.error is not None}),
        "rounds": configuration.rounds,
        "requests": [_request_row(record) for record in configuration.records],
    }


def _request_row(record: Record) -> dict[str, object]:
    return {
        "ttft_s": record.ttft_s,
        "tpot_s": record.tpot_s,
        "e2e_s": record.finished_s - record.sent_s,
        "prompt_tokens": record.num_prompt_tokens,
        "output_tokens": record.num_output_tokens,
        "error": record.error,
    }


def print_summary(console: Console, result: dict[str, Any], has_slo: bool) -> None:
    console.print(f"\n[bold]{result['name']}[/bold]", highlight=False)
    names = ("mean", "p50", "p90", "p99")
    spreads = {label: result[key] for label, key in (("TTFT", "ttft_s"), ("ITL", "itl_s"), ("TPOT", "tpot_s"))}
    rows = [[label, *(f"{x[name] * 1e3:.1f}" for name in names)] for label, x in spreads.items() if x is not None]
    if rows:
        print_table(console, ["ms", *names], rows)
    for line in _lines(result, has_slo):
        console.print(line, highlight=False, markup=False)


def _lines(result: dict[str, Any], has_slo: bool) -> list[str]:
    lines = [
        "{num_requests} requests in {duration_s:.1f} s: {requests_per_s:.2f} requests/s,"
        " {output_tokens_per_s:.1f} output tokens/s, {num_errors} errors".format_map(result)
    ]
    if has_slo:
        lines.append("goodput {goodput_per_s:.2f} requests/s ({good_fraction:.0%} within the SLO)".format_map(result))
    server = result["server"]
    if "transfer_bytes_per_s" in server:
        lines.append(
            "{transfers:.0f} transfers, {transfer_bytes:.0f} bytes in {transfer_calls:.0f} calls,".format_map(server)
            + f" {server['transfer_bytes_per_s'] / 1e9:.2f} GB/s, {server['transfer_hidden_fraction']:.0%} hidden"
        )
    if "step_overhead_fraction" in server:
        lines.append(f"steps: {server['step_overhead_fraction']:.1%} neither model nor sampling")
    if result["tokens_per_event"] > 1.05:
        lines.append("ITL is of events, each of {tokens_per_event:.2f} tokens".format_map(result))
    if result["num_clipped"]:
        lines.append("{num_clipped} requests were cut to what the server takes".format_map(result))
    lines.append("client: {client_core_fraction:.0%} of a core, {max_late_s:.3f} s late at most".format_map(result))
    return lines + [f"error: {error}" for error in result["errors"][:3]]


# --- the program ---------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a server that runs already")
    where.add_argument("--serve", action="append", metavar="ARGS", help="`flowkv serve ARGS`; repeat it to compare")
    parser.add_argument("--rounds", type=_positive(int), default=1, help="runs on each server, in turns")
    load = parser.add_argument_group("workload")
    load.add_argument("--trace", type=Path, help="Mooncake .jsonl or Azure .csv, gzipped or not")
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
    """Raises BenchmarkError for a trace that is broken or too short."""
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
        print_summary(console, result, has_slo=_slo(args) != Slo())
    options = {name: value if isinstance(value, int | list) else str(value) for name, value in vars(args).items()}
    write_report(args.output, {"options": options, "configurations": results})
    console.print(f"\nwrote {args.output}", highlight=False, soft_wrap=True)
    return 1 if any(result["num_errors"] for result in results) else 0


def main() -> None:
    exit_on_sigterm()
    try:
        sys.exit(run(parse_arguments(), Console()))
    except BenchmarkError as error:
        sys.exit(f"benchmarks.serve: {error}")


if __name__ == "__main__":
    main()
