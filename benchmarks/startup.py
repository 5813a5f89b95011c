"""Seconds from starting `flowkv serve` to its first token, beside the floor: importing torch and the model's class.

    python -m benchmarks.startup

The bundled model, one instance, files in the page cache (a first start of each is not counted). Server and floor take
turns. The floor is a Python process that imports what it must and ends; a second one loads the weights too.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from rich.console import Console

from benchmarks.report import ROOT, print_table, write_report
from benchmarks.spawn import ServerProcess, exit_on_sigterm
from flowkv.bundled import MODEL_FOLDER

IMPORTS = "import torch; from transformers import LlamaForCausalLM"
WEIGHTS = f"{IMPORTS}; LlamaForCausalLM.from_pretrained({str(MODEL_FOLDER)!r})"


def python_s(code: str) -> float:
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - began_s


def first_token_s(log: Path, options: list[str]) -> float:
    """The server is up when its last process is ready; the request is one more."""
    began_s = time.perf_counter()
    with ServerProcess(options, log) as url:
        body = {"prompt": "copper = walrus", "max_tokens": 1, "temperature": 0}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60.0).raise_for_status()
        return time.perf_counter() - began_s


def main() -> None:
    exit_on_sigterm()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "startup.json")
    args = parser.parse_args()
    log = args.output.with_suffix(".log")
    measured: dict[str, Callable[[], float]] = {
        "torch and the model's class imported": lambda: python_s(IMPORTS),
        "the weights loaded too": lambda: python_s(WEIGHTS),
        "flowkv serve --mixed 1, first token": lambda: first_token_s(log, ["--mixed", "1"]),
        "flowkv serve (1P + 1D), first token": lambda: first_token_s(log, []),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(args.rounds + 1):
        for name, call in measured.items():
            elapsed_s = call()
            if number:
                seconds[name].append(elapsed_s)
                print(f"round {number}: {name}: {elapsed_s:.2f} s", flush=True)
    floor_s = statistics.median(seconds["torch and the model's class imported"])
    rows = [
        (name, f"{statistics.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}",
         f"{statistics.median(times) - floor_s:+.2f}")
        for name, times in seconds.items()
    ]  # fmt: skip
    print_table(Console(), ("", "median, s", "range", "over the floor"), rows, f"start-up, {args.rounds} rounds")
    write_report(args.output, {"rounds": args.rounds, "seconds": seconds})


if __name__ == "__main__":
    main()
