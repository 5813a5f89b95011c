"""Where to make room in a fragmented pool: the window that the fewest blocks have to leave."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Stretch(NamedTuple):
    """Entries `start` to `stop` (exclusive) of a block table, consecutive blocks."""

    start: int
    stop: int


def cheapest_window(
    num_blocks: int, segments: Iterable[tuple[int, int]], movable: Iterable[int], size: int
) -> int | None:
    """First block of the `size` consecutive ones that hold the fewest used blocks, all of which may move; the lowest
    such window, or None if there is none. O(num_blocks).

    `segments` are the free ones as (start, length), `movable` the used blocks that may move.
    """
    if not 0 < size <= num_blocks:
        return None
    used = np.ones(num_blocks, np.int64)
    for start, length in segments:
        used[start : start + length] = 0
    fixed = used.copy()
    fixed[list(movable)] = 0
    num_moves = np.where(_sums(fixed, size) == 0, _sums(used, size), num_blocks + 1)
    best = int(num_moves.argmin())
    return best if num_moves[best] <= num_blocks else None


def stretches_within(table: list[int], start: int, stop: int) -> Iterator[Stretch]:
    """The parts of a block table that lie in the blocks from `start` to `stop` (exclusive)."""
    i = 0
    while i < len(table):
        j = i + 1
        if start <= table[i] < stop:
            while j < len(table) and table[j] == table[j - 1] + 1 and table[j] < stop:
                j += 1
            yield Stretch(i, j)
        i = j


def _sums(values: np.ndarray[tuple[int], np.dtype[np.int64]], size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Sum of every `size` consecutive values, by where they begin."""
    sums = np.concatenate(([0], np.cumsum(values)))
    return sums[size:] - sums[:-size]
