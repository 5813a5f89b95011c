"""What every benchmark shares: the machine it ran on, percentiles, one JSON file, one table."""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from rich.console import Console

from flowkv.sim.figures import percentile, summarize
from flowkv.sim.files import replaced
from flowkv.sim.report import print_table

__all__ = ["ROOT", "environment", "percentile", "print_table", "summarize", "write_report"]

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


def write_results(console: Console, arguments: argparse.Namespace, results: Mapping[str, object]) -> None:
    """`results` with the options that they were taken with, to `arguments.output`; says so."""
    options = {name: _plain(value) for name, value in vars(arguments).items()}
    write_report(arguments.output, {"options": options, **results})
    console.print(f"wrote {arguments.output}", highlight=False, soft_wrap=True)


def _plain(value: object) -> object:
    """As JSON has it, as far as it does: it has no infinity."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float) and math.isfinite(value) else str(value)


def write_report(path: Path, results: Mapping[str, object]) -> None:
    """Write `results` and the environment as one JSON file, whole or not at all, making its folder where needed."""
    text = json.dumps({"environment": environment(), **results}, indent=1, allow_nan=False)
    with replaced(path) as file:
        file.write(text.encode() + b"\n")
