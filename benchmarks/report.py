"""What every benchmark shares: the machine it ran on, percentiles, one JSON file, one table."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flowkv", "torch", "transformers", "numba", "numpy")


def environment() -> dict[str, object]:
    """Machine, versions, commit and command line of this run, and the time at which this was asked.

    `dirty` is True where tracked files were changed; both are None outside a git checkout.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else changed != "",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the values lie, linear between neighbours (numpy's default).

    Raises ValueError where there are no values.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    at = fraction * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50, p90, p99 and max; None where there are no values."""
    if not values:
        return None
    points = {name: percentile(values, fraction) for name, fraction in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {"mean": sum(values) / len(values), **points, "max": max(values)}


def write_report(path: Path, results: Mapping[str, object]) -> None:
    """Write `results` and the environment as one JSON file, making its folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **results}, indent=1, allow_nan=False)
    path.write_text(text + "\n")


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
