"""Which blocks go in one call (FlowKV, bidirectional segment alignment)."""

from collections.abc import Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Blocks consecutive on both sides: `num_blocks` of them from `src_block` on go to `dst_block` on."""

    src_block: int
    dst_block: int
    num_blocks: int


def plan_runs(src_blocks: Sequence[int], dst_blocks: Sequence[int]) -> list[Run]:
    """Cut two parallel block lists into the fewest runs, in order. O(n) in blocks.

    ValueError if the lists differ in length.
    """
    if len(src_blocks) != len(dst_blocks):
        raise ValueError(f"{len(src_blocks)} source blocks cannot go to {len(dst_blocks)} destination blocks")
    if src_blocks and _is_run(src_blocks) and _is_run(dst_blocks):
        return [Run(src_blocks[0], dst_blocks[0], len(src_blocks))]
    runs: list[Run] = []
    i = 0
    while i < len(src_blocks):
        j = i + 1
        while j < len(src_blocks) and src_blocks[j] == src_blocks[j - 1] + 1 and dst_blocks[j] == dst_blocks[j - 1] + 1:
            j += 1
        runs.append(Run(src_blocks[i], dst_blocks[i], j - i))
        i = j
    return runs


def _is_run(blocks: Sequence[int]) -> bool:
    """What is mostly so, found out without looking at one block after the other in Python."""
    return blocks[-1] - blocks[0] == len(blocks) - 1 and list(blocks) == list(range(blocks[0], blocks[-1] + 1))
