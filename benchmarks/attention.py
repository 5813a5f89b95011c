"""Decode attention over a block-major pool, three ways: what docs/decisions/0002 was decided on.

One call is one layer of one step: every sequence of the batch has one query token. Designs are timed in turns, so that
what else the machine does falls on all of them alike; figures are medians, ratios medians over the turns.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.report import percentile, print_table, write_report
from flowkv.model.cpu_kernel import CpuKernel
from flowkv.model.packing import PackedBatch, pack

BLOCK_SIZE = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINE = "gather"

Design = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    num_layers: int
    num_kv_heads: int
    num_heads: int
    head_dim: int


SHAPES = (Shape("8 layers, 4/8 heads x 64", 8, 4, 8, 64), Shape("bundled: 4 layers, 2/6 heads x 32", 4, 2, 6, 32))


@dataclass(frozen=True, slots=True)
class Case:
    shape: Shape
    dtype: str
    batch: int
    context: int

    @property
    def kv_bytes(self) -> int:
        """Read by one call."""
        shape = self.shape
        return self.batch * self.context * 2 * shape.num_kv_heads * shape.head_dim * DTYPES[self.dtype].itemsize


def designs(case: Case) -> dict[str, Design]:
    """Each computes layer `i` to [batch, H, D] over the same pool; a sequence's blocks are consecutive."""
    shape = case.shape
    num_blocks = -(-case.context // BLOCK_SIZE)
    pool_shape = (case.batch * num_blocks, shape.num_layers, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    pool = torch.randn(pool_shape).to(DTYPES[case.dtype])
    query = torch.randn(case.batch, shape.num_heads, shape.head_dim).to(pool.dtype)
    tables = torch.arange(case.batch * num_blocks).view(case.batch, num_blocks)
    batch = pack([case.context - 1] * case.batch, [1] * case.batch, tables.tolist(), BLOCK_SIZE)
    return {
        BASELINE: gather_design(pool, query, tables, case.context),
        "einsum": einsum_design(pool, query, num_blocks, case.context),
        "numba": numba_design(pool, query, batch),
    }


def gather_design(pool: torch.Tensor, query: torch.Tensor, tables: torch.Tensor, context: int) -> Design:
    """Copies the batch's KV of a layer together, then torch's fused kernel."""

    def run(layer: int) -> torch.Tensor:
        gathered = pool[:, layer][tables].transpose(1, 2).flatten(2, 3)[:, :, :context]
        key, value = gathered.transpose(2, 3).unbind(1)
        return scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)[:, :, 0]

    return run


def einsum_design(pool: torch.Tensor, query: torch.Tensor, num_blocks: int, context: int) -> Design:
    """Batched products over the strided view of a sequence's blocks; only for blocks that are consecutive."""
    batch, num_heads, head_dim = query.shape
    grouped = query.view(batch, pool.shape[4], -1, head_dim)

    def run(layer: int) -> torch.Tensor:
        out = []
        for index in range(batch):
            key, value = pool[index * num_blocks : (index + 1) * num_blocks, layer].unbind(1)
            scores = torch.einsum("hgd,nshd->hgns", grouped[index], key) * head_dim**-0.5
            flat = scores.flatten(2).float()
            flat[:, :, context:] = float("-inf")
            weights = flat.softmax(-1).view(scores.shape).to(value.dtype)
            out.append(torch.einsum("hgns,nshd->hgd", weights, value).reshape(num_heads, head_dim))
        return torch.stack(out)

    return run


def numba_design(pool: torch.Tensor, query: torch.Tensor, batch: PackedBatch) -> Design:
    """What FlowKV does: online softmax over the block table, in place."""
    kernel, scale = CpuKernel(pool), query.shape[-1] ** -0.5
    return lambda layer: kernel.attend(query, layer, batch, scale)


def measure(case: Case, num_turns: int) -> dict[str, list[float]]:
    """Seconds a layer of every design, one figure a turn. ValueError if two designs disagree."""
    candidates = designs(case)
    outputs = {name: run(0).float() for name, run in candidates.items()}
    for name, output in outputs.items():
        if not torch.allclose(output, outputs[BASELINE], atol=3e-2 if case.dtype == "bfloat16" else 1e-4):
            raise ValueError(f"{name} does not compute what {BASELINE} does for {case}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(num_turns):
        for name, run in candidates.items():
            started_s = time.perf_counter()
            for layer in range(case.shape.num_layers):
                run(layer)
            seconds[name].append((time.perf_counter() - started_s) / case.shape.num_layers)
    return seconds


def summarize_case(case: Case, seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, values in seconds.items():
        median_s = percentile(values, 0.5)
        ratios = [baseline / own for baseline, own in zip(seconds[BASELINE], values, strict=True)]
        figures = {
            "layer_s": median_s,
            "kv_bytes_per_s": case.kv_bytes / median_s,
            "times_gather": percentile(ratios, 0.5),
        }
        rows.append({**asdict(case), "design": name, **figures})
    return rows


def show(console: Console, case: Case, rows: list[dict[str, object]]) -> None:
    title = f"{case.shape.name}, {case.dtype}, batch {case.batch} x {case.context} tokens"
    cells = [
        [str(row["design"]), f"{row['layer_s']:.6f}", f"{row['kv_bytes_per_s']:.3g}", f"{row['times_gather']:.2f}"]
        for row in rows
    ]
    print_table(console, ["design", "s/layer", "KV bytes/s", "times as fast as gather"], cells, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("results/attention.json"))
    parser.add_argument("--turns", type=int, default=15, help="times each design is timed in every case")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the Numba kernel has one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console, rows = Console(), []
    for shape, dtype, batch, context in product(SHAPES, DTYPES, (1, 8), (192, 2048)):
        case = Case(shape, dtype, batch, context)
        summary = summarize_case(case, measure(case, args.turns))
        show(console, case, summary)
        rows += summary
    write_report(args.out, {"block_size": BLOCK_SIZE, "threads": args.threads, "turns": args.turns, "cases": rows})
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
