"""What a run is told with: a table on the terminal and one JSON, the same for real runs and simulated ones."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from flowkv.sim.figures import Record, SimResult, Slo, figures, server_figures, totals
from flowkv.sim.files import replaced

_SPREADS = {"TTFT": "ttft_s", "ITL": "itl_s", "TPOT": "tpot_s", "E2EL": "e2el_s"}
_POINTS = ("mean", "p50", "p90", "p99")
_RECORD_FIELDS = (
    "arrival_s", "num_prompt_tokens", "num_output_tokens", "prefill_instance", "decode_instance",
    "ttft_s", "tpot_s", "e2el_s", "error",
)  # fmt: skip


def summary(result: SimResult, slo: Slo) -> dict[str, Any]:
    """The figures of a simulated run: those of `figures`, and what instances and controller have counted."""
    counted = server_figures(totals(result.counters.values()))
    return {**figures(result, slo), "num_flips": len(result.flips), "server": counted, "errors": errors(result.records)}


def errors(records: Iterable[Record]) -> list[str]:
    """Every different error, in order."""
    return sorted({record.error for record in records if record.error is not None})


def request_columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One list for each field, with one value for each request: a tenth of the size of one object a request."""
    return {name: [getattr(record, name) for record in records] for name in _RECORD_FIELDS}


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """One line for each key; the file is there whole or not at all. Raises ConfigError if it cannot be written."""
    with replaced(path) as file:
        lines = (msgspec.json.encode(key) + b": " + msgspec.json.encode(value) for key, value in content.items())
        file.write(b"{\n" + b",\n".join(lines) + b"\n}\n")


# --- on the terminal -----------------------------------------------------------------------------------------------


def print_table(
    console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
) -> None:
    """A table whose first column is text and whose others are figures."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_summary(console: Console, name: str, run: Mapping[str, Any], slo: Slo, notes: Iterable[str] = ()) -> None:
    """What `figures` says of one run with its `server` and `errors`, and notes that only this kind of run has."""
    console.print(f"\n[bold]{name}[/bold]", highlight=False)
    spreads = {label: run[key] for label, key in _SPREADS.items() if run[key] is not None}
    if spreads:
        rows = [[label, *(f"{spread[point] * 1e3:.1f}" for point in _POINTS)] for label, spread in spreads.items()]
        print_table(console, ["ms", *_POINTS], rows)
    for line in (*_lines(run, slo), *notes, *(f"error: {error}" for error in run["errors"][:3])):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _lines(run: Mapping[str, Any], slo: Slo) -> list[str]:
    lines = [
        "{num_requests} requests in {duration_s:.1f} s: {requests_per_s:.2f} requests/s,"
        " {output_tokens_per_s:.1f} output tokens/s, {num_errors} errors, {num_refused} refused".format_map(run)
    ]
    if slo != Slo():
        lines.append("goodput {goodput_per_s:.2f} requests/s ({good_fraction:.1%} within the SLO)".format_map(run))
    server = run["server"]
    if "transfer_bytes_per_s" in server:
        lines.append(
            "{transfers:.0f} transfers, {transfer_bytes:.0f} bytes in {transfer_calls:.0f} calls,".format_map(server)
            + f" {server['transfer_bytes_per_s'] / 1e9:.2f} GB/s, {server['transfer_hidden_fraction']:.0%} hidden"
        )
    if "step_overhead_fraction" in server:
        lines.append(f"steps: {server['step_overhead_fraction']:.1%} neither model nor sampling")
    return lines
