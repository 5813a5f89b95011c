"""A batch without padding, as the arrays that the attention kernels read. Made once a step, used by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N stretches of consecutive tokens, one after the other: T query tokens in all.

    positions      [T]     place of each token in its own sequence
    slot_blocks    [T]     block that takes its KV, and
    slot_offsets   [T]     the slot within that block
    query_starts   [N + 1] first query token of each stretch, and T
    context_tokens [N]     tokens whose KV each stretch may read, its own included
    block_tables   [N, M]  padded with 0
    decode_items   [R]     stretches of a single token, and
    decode_rows    [R]     which query token that is
    chunk_items            stretches of several tokens
    """

    positions: Int64Array
    slot_blocks: Int32Array
    slot_offsets: Int32Array
    query_starts: Int32Array
    context_tokens: Int32Array
    block_tables: Int32Array
    decode_items: Int32Array
    decode_rows: Int32Array
    chunk_items: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.positions)


def pack(
    starts: Sequence[int], num_tokens: Sequence[int], block_tables: Sequence[list[int]], block_size: int
) -> PackedBatch:
    """Stretch i covers positions `starts[i]` to `starts[i] + num_tokens[i]`; its table reaches at least that far."""
    start = np.asarray(starts, dtype=np.int64)
    count = np.asarray(num_tokens, dtype=np.int64)
    query_starts = np.zeros(len(count) + 1, dtype=np.int32)
    query_starts[1:] = count.cumsum()
    tables = pad_tables(block_tables)
    if len(count) == query_starts[-1]:
        owner, positions = np.arange(len(count)), start
    else:
        owner = np.repeat(np.arange(len(count)), count)
        positions = np.arange(query_starts[-1]) + (start - query_starts[:-1])[owner]
    single = np.flatnonzero(count == 1).astype(np.int32)
    return PackedBatch(
        positions=positions,
        slot_blocks=tables[owner, positions // block_size],
        slot_offsets=(positions % block_size).astype(np.int32),
        query_starts=query_starts,
        context_tokens=(start + count).astype(np.int32),
        block_tables=tables,
        decode_items=single,
        decode_rows=query_starts[single],
        chunk_items=tuple(np.flatnonzero(count > 1).tolist()),
    )


def pad_tables(block_tables: Sequence[list[int]]) -> Int32Array:
    """Block tables of any lengths as one [N, M] array."""
    tables = np.zeros((len(block_tables), max(map(len, block_tables), default=0)), dtype=np.int32)
    for row, table in zip(tables, block_tables, strict=True):
        row[: len(table)] = table
    return tables


def slots(batch: PackedBatch, item: int, start: int, stop: int, block_size: int) -> tuple[Any, Any]:
    """Block ids and offsets of positions `start` to `stop` of one stretch's sequence."""
    positions = np.arange(start, stop)
    return batch.block_tables[item, positions // block_size], positions % block_size
