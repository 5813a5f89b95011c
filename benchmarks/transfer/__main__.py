"""`python -m benchmarks.transfer [ladder|peers|tcp|handover|polling|all]`: measure, print tables, write one JSON."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from benchmarks import BenchmarkError
from benchmarks.report import write_report
from benchmarks.spawn import exit_on_sigterm
from benchmarks.transfer import (
    handover,
    ladder,
    mooncake_peer,
    namespaces,
    nixl_agents,
    peers,
    polling,
    summary,
    tables,
)
from benchmarks.transfer.geometry import LLAMA_8B, PROMPTS
from benchmarks.transfer.sides import Progress as Report
from benchmarks.transfer.sides import run_pair

PARTS = ("ladder", "peers", "tcp", "handover", "polling")
GRID_PROMPTS = (1_000, 4_000)  # where many configurations are compared
SMALL_SOCKETS = {"UCX_TCP_SNDBUF": "128k", "UCX_TCP_RCVBUF": "128k"}


@dataclass(slots=True)
class Run:
    """What was asked for, and what has come of it so far."""

    prompts: tuple[int, ...]
    mooncake_python: str | None
    report: Report
    console: Console
    has_nixl: bool = field(default_factory=nixl_agents.is_installed)
    results: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def backends(self) -> tuple[str, ...]:
        return ("shm", "nixl") if self.has_nixl else ("shm",)

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(n for n in self.prompts if n in GRID_PROMPTS) or self.prompts[:1]

    def skip(self, reason: str) -> None:
        self.skipped.append(reason)
        self.console.print(f"skipped: {reason}", highlight=False, soft_wrap=True)


def run_ladder(run: Run) -> None:
    options = ladder.Options(prompts=run.prompts, backends=run.backends)
    if not run.has_nixl:
        run.skip("the ladder over nixl: NIXL is not installed (pip install 'flowkv[nixl]')")
    samples = msgspec.convert(run_pair("ladder", options, run.report), list[ladder.Sample])
    rows, modelled = summary.ladder_rows(options, samples), summary.modelled_rows(options)
    run.results["ladder"] = {"rows": rows, "modelled_not_measured": modelled}
    tables.print_ladder(run.console, rows, modelled)


def run_peers(run: Run) -> None:
    """Within this node: UCX's own choice of transport, which is a copy from process to process (CMA)."""
    if not run.has_nixl:
        run.skip("peers: NIXL is not installed (pip install 'flowkv[nixl]')")
        return
    grid = run.grid
    groups = {
        "no progress thread: NIXL at its best": peers.Options(prompts=run.prompts),
        "the same in huge pages": peers.Options(prompts=grid, has_huge_pages=True),
        "no progress thread, 4 threads": peers.Options(prompts=grid, num_threads=4, has_ours=False),
        "progress thread (NIXL's default)": peers.Options(prompts=grid, has_progress_thread=True, has_ours=False),
        "progress thread, 4 threads (as vLLM ships it)": peers.Options(
            prompts=grid, has_progress_thread=True, num_threads=4, has_ours=False
        ),
    }
    run.results["peers"] = [_peer_group(run, f"One node, {name}", options, {}) for name, options in groups.items()]


def run_tcp(run: Run) -> None:
    """Between two network namespaces."""
    try:
        with namespaces.joined() as spaces:
            if run.has_nixl:
                run.results["tcp"] = _tcp_groups(run, spaces)
            else:
                run.skip("NIXL over TCP: NIXL is not installed (pip install 'flowkv[nixl]')")
            _run_mooncake(run, spaces)
    except namespaces.NoNamespacesError as error:
        run.skip(f"TCP between namespaces: {error}")


def _tcp_groups(run: Run, spaces: namespaces.Namespaces) -> list[dict[str, Any]]:
    grid, raw = run.grid, spaces.addresses[1]
    shipped = peers.Options(
        prompts=grid[:1], turns=3, has_progress_thread=True, num_threads=4, has_ours=False, raw_address=raw
    )
    groups: dict[str, tuple[peers.Options, dict[str, str]]] = {
        "no progress thread": (peers.Options(prompts=grid, raw_address=raw), {}),
        "no progress thread, 128 KiB socket buffers": (peers.Options(prompts=grid[:1], raw_address=raw), SMALL_SOCKETS),
        "progress thread, 4 threads (as vLLM ships it)": (shipped, {}),
    }
    return [
        _peer_group(run, f"TCP between namespaces, {name}", options, {"UCX_TLS": "tcp", **env}, spaces)
        for name, (options, env) in groups.items()
    ]


def _peer_group(
    run: Run,
    name: str,
    options: peers.Options,
    env: dict[str, str],
    spaces: namespaces.Namespaces | None = None,
) -> dict[str, Any]:
    """One configuration of the agents. One that fails says so in its place."""
    group: dict[str, Any] = {"name": name, "environment": env, "options": options, "rows": [], "ratios": []}
    prefixes = spaces.prefixes if spaces else ((), ())
    try:
        found = run_pair("peers", options, run.report, prefixes=prefixes, env=env)
    except BenchmarkError as error:
        run.skip(f"{name}: {error}")
        return {**group, "failed": str(error)}
    samples = msgspec.convert(found, list[peers.Sample])
    group |= {"rows": summary.peer_rows(options, samples), "ratios": summary.peer_ratios(samples)}
    tables.print_peers(run.console, group)
    return group


def _run_mooncake(run: Run, spaces: namespaces.Namespaces) -> None:
    if run.mooncake_python is None:
        run.skip("Mooncake: name an interpreter that has its engine with --mooncake-python")
        return
    options = mooncake_peer.Options(prompts=run.grid)
    try:
        samples = mooncake_peer.measure(options, run.mooncake_python, spaces, run.report)
    except BenchmarkError as error:
        run.skip(f"Mooncake: {error}")
        return
    rows = [_mooncake_row(sample) for sample in samples]
    run.results["mooncake"] = rows
    tables.print_mooncake(run.console, rows)


def _mooncake_row(sample: mooncake_peer.Sample) -> dict[str, Any]:
    num_bytes = LLAMA_8B.num_blocks_for(sample.num_tokens) * LLAMA_8B.block_bytes
    row: dict[str, Any] = {**msgspec.to_builtins(sample), "num_bytes": num_bytes}
    return row | ({"best_bytes_per_s": num_bytes / min(sample.seconds)} if sample.seconds else {})


def run_handover(run: Run) -> None:
    if not run.has_nixl:
        run.skip("the hand-over over nixl: NIXL is not installed (pip install 'flowkv[nixl]')")
    options = handover.Options(prompts=run.prompts, backends=run.backends)
    rows = summary.handover_rows(options, handover.measure(options, run.report))
    run.results["handover"] = {"options": msgspec.to_builtins(options), "rows": rows}
    tables.print_handover(run.console, rows)


def run_polling(run: Run) -> None:
    if not run.has_nixl:
        run.skip("polling: NIXL is not installed (pip install 'flowkv[nixl]')")
        return
    run.results["polling"] = shares = polling.measure(run.report)
    tables.print_polling(run.console, shares)


RUNS: dict[str, Callable[[Run], None]] = dict(
    zip(PARTS, (run_ladder, run_peers, run_tcp, run_handover, run_polling), strict=True)
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS), help="their lengths in tokens")
    parser.add_argument("--mooncake-python", help="an interpreter that can import mooncake.engine")
    parser.add_argument("--output", type=Path, default=Path("results/transfer.json"))
    return parser.parse_args(arguments)


def main() -> None:
    exit_on_sigterm()
    args = parse_arguments()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            run = Run(
                tuple(args.prompts),
                args.mooncake_python,
                lambda fraction, text: bar.update(task, completed=fraction, description=text),
                console,
            )
            for part in PARTS if args.part == "all" else (args.part,):
                RUNS[part](run)
    except BenchmarkError as error:
        sys.exit(f"benchmarks.transfer: {error}")
    write_report(args.output, msgspec.to_builtins({"skipped": run.skipped, **run.results}))
    console.print(f"\nwrote {args.output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
