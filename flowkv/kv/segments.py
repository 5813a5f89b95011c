"""Free blocks kept as segments, so that what is allocated together lies together (FlowKV, section on allocation)."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable


class SegmentAllocator:
    """Block ids `0 .. num_blocks - 1`; the free ones as maximal runs of consecutive ids.

    Best fit: a request takes the low end of the smallest segment that holds it whole; where none does, the largest
    segments until it is covered, which is the fewest pieces. Single blocks to grow by come from the high end of the
    pool (docs/decisions/0005). Freed blocks merge with their neighbours. Finding a segment is O(log S) in the number
    of segments.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = 0
        self._length_at: dict[int, int] = {}  # segment start -> length
        self._starts: list[int] = []  # sorted
        self._by_length: list[tuple[int, int]] = []  # (length, start), sorted
        self._insert(0, num_blocks)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """That many blocks in as few segments as possible, or None (and no change) if fewer are free."""
        if num_blocks > self.num_free:
            return None
        blocks: list[int] = []
        while (missing := num_blocks - len(blocks)) > 0:
            fit = bisect_left(self._by_length, (missing, -1))
            length, start = self._by_length[min(fit, len(self._by_length) - 1)]
            blocks += self.claim(start, min(length, missing))
        return blocks

    def allocate_high(self, num_blocks: int) -> list[int] | None:
        """The free blocks with the highest ids, the highest first, or None (and no change) if fewer are free."""
        if num_blocks > self.num_free:
            return None
        blocks: list[int] = []
        while (missing := num_blocks - len(blocks)) > 0:
            start = self._starts[-1]
            stop = start + self._length_at[start]
            blocks += reversed(self.claim(max(start, stop - missing), min(missing, stop - start)))
        return blocks

    def claim(self, start: int, count: int) -> list[int]:
        """Exactly these blocks. They must be free; that is the caller's to know."""
        segment = self._starts[max(0, self._index_after(start) - 1)]
        length = self._remove(segment)
        before, after = start - segment, segment + length - (start + count)
        assert before >= 0 and after >= 0, f"blocks {start}+{count} are not all free"
        if before:
            self._insert(segment, before)
        if after:
            self._insert(start + count, after)
        return list(range(start, start + count))

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back, in any order. AssertionError for one that is free already or comes twice."""
        ordered = sorted(blocks)
        i = 0
        while i < len(ordered):
            start = ordered[i]
            # From one id to the next the distance to `start` grows by 1 within a run, and by more after it.
            j = bisect_right(range(len(ordered)), start - i, lo=i, key=lambda k: ordered[k] - k)
            assert ordered[j - 1] - start == j - 1 - i, f"of the blocks from {start} on one is freed twice"
            self._merge(start, j - i)
            i = j

    def segments(self) -> list[tuple[int, int]]:
        """(start, length) of every free segment, by start."""
        return [(start, self._length_at[start]) for start in self._starts]

    def num_segments_for(self, num_blocks: int) -> int:
        """How many segments `allocate` takes them from, which is the fewest possible; all if these are too few."""
        covered = 0
        for i in range(len(self._by_length)):
            if covered >= num_blocks:
                return i
            covered += self._by_length[-1 - i][0]
        return len(self._by_length)

    def largest(self, count: int) -> list[tuple[int, int]]:
        """(start, length) of the `count` largest free segments, or of all if there are fewer; the largest first."""
        return [(start, length) for length, start in self._by_length[: -count - 1 : -1]]

    def check_integrity(self) -> None:
        """Raise AssertionError unless segments are disjoint, maximal, inside the pool and counted right."""
        previous_end = -1
        for start, length in self.segments():
            assert length > 0 and start > previous_end, f"segment {start}+{length} touches the one before it"
            previous_end = start + length
        assert previous_end <= self.num_blocks
        assert self._starts == sorted(self._length_at)
        assert self._by_length == sorted((length, start) for start, length in self._length_at.items())
        assert self.num_free == sum(self._length_at.values())

    def _index_after(self, block: int) -> int:
        """Where in `_starts` the first segment that starts beyond `block` is."""
        return bisect_left(self._starts, block + 1)

    def _merge(self, start: int, length: int) -> None:
        if start + length in self._length_at:
            length += self._remove(start + length)
        i = self._index_after(start)
        assert i == len(self._starts) or self._starts[i] > start + length, f"blocks {start}+{length} are freed twice"
        if i:
            before = self._starts[i - 1]
            gap = start - (before + self._length_at[before])
            assert gap >= 0, f"block {start} was freed twice"
            if gap == 0:
                length += self._remove(before)
                start = before
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        insort(self._starts, start)
        insort(self._by_length, (length, start))
        self.num_free += length

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        self.num_free -= length
        return length
