"""Our packed bfloat16 products beside oneDNN's, for the matrices of a small Llama and batches of 1 to 512 rows.

    python -m benchmarks.linear

Both hold weights packed for them, compute with one thread and take turns; each call gets the next of as many copies of
the matrix as fill `--spread`, so that weights come from memory, as they do in a step. The figure is the fastest of
`--rounds` passes over the copies.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.report import ROOT, print_table, write_report
from flowkv.model.linear import Bf16Linear, Linear, OneDnnLinear

SHAPES = ((512, 1536), (512, 2816), (1408, 512), (512, 32000))  # inputs, outputs
ROWS = (1, 2, 4, 8, 16, 64, 512)
KINDS: dict[str, Callable[[torch.Tensor, None], Linear]] = {"ours": Bf16Linear, "oneDNN": OneDnnLinear}


def pass_s(layers: Sequence[Linear], x: torch.Tensor) -> float:
    """Seconds a call, over one pass."""
    began_s = time.perf_counter()
    for layer in layers:
        layer(x)
    return (time.perf_counter() - began_s) / len(layers)


@torch.inference_mode()
def measure(num_inputs: int, num_outputs: int, rounds: int, spread_bytes: int) -> list[dict[str, Any]]:
    num_copies = max(1, spread_bytes // (2 * num_inputs * num_outputs))
    weights = [torch.randn(num_outputs, num_inputs).bfloat16() for _ in range(num_copies)]
    layers = {name: [kind(weight, None) for weight in weights] for name, kind in KINDS.items()}
    found = []
    for num_rows in ROWS:
        x = torch.randn(num_rows, num_inputs).bfloat16()
        passes: dict[str, list[float]] = {name: [] for name in KINDS}
        for _ in range(rounds + 1):
            for name in KINDS:
                passes[name].append(pass_s(layers[name], x))
        seconds = {name: min(times[1:]) for name, times in passes.items()}
        found.append({"inputs": num_inputs, "outputs": num_outputs, "rows": num_rows, "seconds": seconds})
    return found


def table_row(one: dict[str, Any]) -> tuple[str, ...]:
    seconds, size = one["seconds"], one["inputs"] * one["outputs"]
    rates = [f"{2 * one['rows'] * size / seconds[name] / 1e9:.0f}" for name in KINDS]
    reads = [f"{2 * size / seconds[name] / 1e9:.1f}" for name in KINDS]
    micros = [f"{1e6 * seconds[name]:.0f}" for name in KINDS]
    ratio = f"{seconds['oneDNN'] / seconds['ours']:.2f}"
    return (f"{one['inputs']} x {one['outputs']}", str(one["rows"]), *micros, *reads, *rates, ratio)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--spread", type=int, default=64_000_000, metavar="BYTES")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "linear.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [one for shape in SHAPES for one in measure(*shape, args.rounds, args.spread)]
    header = (
        "matrix",
        "rows",
        *(f"{name}\n{unit}" for unit in ("us", "GB/s", "GFLOP/s") for name in KINDS),
        "times as fast",
    )
    print_table(Console(), header, [table_row(one) for one in results], "bfloat16, one thread")
    write_report(args.output, {"rounds": args.rounds, "spread_bytes": args.spread, "products": results})


if __name__ == "__main__":
    main()
