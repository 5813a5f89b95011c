"""What is moved, and in which calls: the rungs of the ladder. Pure.

A pool holds the same bytes in either of two layouts. Layer by layer it is `[2 * L][num_blocks][piece]`, a plane for
each layer's K and V; block-major it is `[num_blocks][2 * L][piece]` (FlowKV, section 3: (L, 2, B, H) -> (B, L, 2, H)).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flowkv.kv.layout import KvLayout
from flowkv.transfer.plan import Run, plan_runs

LLAMA_8B = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
PROMPTS = (500, 1_000, 4_000, 8_000, 10_000, 13_000)  # tokens

Offsets = npt.NDArray[np.int64]


class Order(StrEnum):
    PER_LAYER = "per layer"
    BLOCK_MAJOR = "block-major"


class Blocks(StrEnum):
    """Where the blocks of a request lie in the pool."""

    FREE_LIST = "free list"  # anywhere, on both sides: what a list of free blocks gives after churn
    SEGMENTS = "segments"  # consecutive, on both sides


class Calls(StrEnum):
    PER_BLOCK = "per block"
    RUNS = "aligned runs"


@dataclass(frozen=True, slots=True)
class Rung:
    order: Order
    blocks: Blocks
    calls: Calls

    @property
    def name(self) -> str:
        return f"{self.order}, {self.blocks}, {self.calls}"


RUNGS = tuple(Rung(*parts) for parts in product(Order, Blocks, Calls))  # from `2 * L * blocks` calls to one
LAST = RUNGS[-1]


class Plan(NamedTuple):
    """Calls as parallel arrays of bytes: call `i` copies `num_bytes[i]` from `src[i]` to `dst[i]` of the pools."""

    src: Offsets
    dst: Offsets
    num_bytes: Offsets


def num_planes(layout: KvLayout) -> int:
    return 2 * layout.num_layers


def piece_bytes(layout: KvLayout) -> int:
    """Of one layer's K or V of one block."""
    return layout.block_bytes // num_planes(layout)


def pool_blocks_for(layout: KvLayout, prompts: Sequence[int]) -> int:
    """Blocks of a pool that holds the longest prompt, with a tenth more for it to be scattered over."""
    longest = layout.num_blocks_for(max(prompts))
    return longest + max(8, longest // 10)


def block_ids(num_blocks: int, pool_blocks: int, blocks: Blocks, side: str) -> list[int]:
    """`num_blocks` ids on one side; the same for the same arguments. ValueError if the pool is smaller."""
    if num_blocks > pool_blocks:
        raise ValueError(f"{num_blocks} blocks do not fit into a pool of {pool_blocks}")
    rng = random.Random(f"{side}/{num_blocks}/{pool_blocks}")
    if blocks is Blocks.FREE_LIST:
        return rng.sample(range(pool_blocks), num_blocks)
    start = rng.randint(0, pool_blocks - num_blocks)
    return list(range(start, start + num_blocks))


def runs_of(rung: Rung, num_blocks: int, pool_blocks: int) -> list[Run]:
    """The stretches of blocks that a rung moves together."""
    src, dst = (block_ids(num_blocks, pool_blocks, rung.blocks, side) for side in ("source", "target"))
    if rung.calls is Calls.RUNS:
        return plan_runs(src, dst)
    return [Run(s, d, 1) for s, d in zip(src, dst, strict=True)]


def plan_calls(order: Order, runs: Sequence[Run], layout: KvLayout, pool_blocks: int) -> Plan:
    """One call a run where a block is one piece of memory, `2 * L` where each layer's K and V lie apart."""
    src, dst, count = np.array(runs, np.int64).reshape(-1, 3).T
    if order is Order.BLOCK_MAJOR:
        size = layout.block_bytes
        return Plan(src * size, dst * size, count * size)
    piece, planes = piece_bytes(layout), num_planes(layout)
    first = (np.arange(planes, dtype=np.int64) * pool_blocks * piece)[:, None]  # of each plane
    return Plan((first + src * piece).ravel(), (first + dst * piece).ravel(), np.tile(count * piece, planes))


def descriptors(order: Order, layout: KvLayout, pool_blocks: int) -> npt.NDArray[np.int64]:
    """(offset, bytes) of every piece of a pool that a peer may name, as vLLM lists them: one for each plane and block
    (at `plane * pool_blocks + block`), or one for each block."""
    if order is Order.BLOCK_MAJOR:
        size, count = layout.block_bytes, pool_blocks
    else:
        size, count = piece_bytes(layout), pool_blocks * num_planes(layout)
    return np.stack([np.arange(count, dtype=np.int64) * size, np.full(count, size, np.int64)], axis=1)


def descriptor_indices(
    order: Order, blocks: Sequence[int], layout: KvLayout, pool_blocks: int
) -> npt.NDArray[np.int32]:
    """Which of `descriptors` hold these blocks, in the order in which both sides must name them."""
    ids = np.asarray(blocks, np.int32)
    if order is Order.BLOCK_MAJOR:
        return ids
    planes = np.arange(num_planes(layout), dtype=np.int32)
    return (planes[:, None] * np.int32(pool_blocks) + ids).ravel()
