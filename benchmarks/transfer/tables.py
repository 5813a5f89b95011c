"""The report's rows as tables for people."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks.report import percentile, print_table
from benchmarks.transfer.geometry import RUNGS, Blocks, Calls, Order, Rung
from benchmarks.transfer.polling import Share

Rows = Sequence[dict[str, Any]]


def print_ladder(console: Console, rows: Rows, modelled: Rows) -> None:
    columns = ("layout, blocks, calls", "tokens", "calls", "ms", "GB/s", "of memcpy", "x the last rung")
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == backend]
        print_table(console, columns, map(_ladder_cells, mine), title=f"The ladder over {backend}")
    slowest = [row for row in modelled if _is_first_rung(row)]
    cells = ([f"{row['num_tokens']:,}", f"{row['num_calls']:,}", _ms(row["modelled_call_seconds"])] for row in slowest)
    console.print("MODELLED, not measured: calls of 34 us each, layer by layer, as in the paper's Table 3 (NCCL)")
    print_table(console, ("tokens", "calls", "ms"), cells)


def _is_first_rung(row: dict[str, Any]) -> bool:
    return Rung(Order(row["order"]), Blocks(row["blocks"]), Calls(row["calls"])) == RUNGS[0]


def _ladder_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['order']}, {row['blocks']}, {row['calls']}",
        f"{row['num_tokens']:,}",
        f"{row['num_calls']:,}",
        _ms(row["seconds"]["median"]),
        f"{row['bytes_per_s'] / 1e9:.2f}",
        f"{row['of_memcpy']:.3f}",
        f"{row['times_last']:.2f}",
    ]


def print_peers(console: Console, group: dict[str, Any]) -> None:
    cells = (
        [
            f"{row['name']}, {row['blocks']}",
            f"{row['num_tokens']:,}",
            _ms(row["seconds"]["median"]),
            f"{row['bytes_per_s'] / 1e9:.2f}",
            f"{row['best_bytes_per_s'] / 1e9:.2f}",
        ]
        for row in group["rows"]
    )
    print_table(console, ("system, blocks", "tokens", "ms", "GB/s", "best"), cells, title=group["name"])
    ratios = (
        [f"{r['best']}, {r['blocks']}", f"{r['num_tokens']:,}", f"{r['times_its_rate']:.2f}"] for r in group["ratios"]
    )
    if group["ratios"]:
        print_table(console, ("FlowKV against the best of its kind", "tokens", "times its rate"), ratios)


def print_polling(console: Console, shares: Sequence[Share]) -> None:
    rows = [[share.state, f"{percentile(share.of_a_core, 0.5):.3f}", f"{max(share.of_a_core):.3f}"] for share in shares]
    title = "What looking for blocks over NIXL costs D, CPU seconds a second"
    print_table(console, ["", "median", "max"], rows, title)


def print_mooncake(console: Console, samples: Rows) -> None:
    cells = (
        [
            f"{row['operation']}, {row['order']}, {row['blocks']}",
            f"{row['num_tokens']:,}",
            f"{row['num_descriptors']:,}",
            row["error"] or f"{row['best_bytes_per_s'] / 1e9:.2f} GB/s at best",
        ]
        for row in samples
    )
    print_table(console, ("Mooncake over TCP", "tokens", "descriptors", "outcome"), cells)


def print_handover(console: Console, rows: Rows) -> None:
    columns = (
        "over, condition", "tokens", "hand-over p50", "p99", "beyond exposed p50", "p99", "exposed", "transfer", "share"
    )  # fmt: skip
    cells = (
        [
            f"{row['backend']}, {row['condition']}",
            f"{row['num_tokens']:,}",
            *(_ms(row[name][point]) for name in ("handover_s", "beyond_exposed_s") for point in ("p50", "p99")),
            _ms(row["exposed_s"]["p50"]),
            _ms(row["transfer_s"]["p50"]),
            f"{row['exposed_fraction']:.3f}",
        ]
        for row in rows
    )
    print_table(console, columns, cells, title="From P's first token to D's second, less one decode step (ms)")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"
