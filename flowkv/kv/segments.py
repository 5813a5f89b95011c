"""Free blocks kept as segments, so that what is allocated together lies together (FlowKV, section on allocation)."""

from bisect import bisect_left, insort


class SegmentAllocator:
    """Block ids `0 .. num_blocks - 1`; the free ones as maximal runs of consecutive ids.

    Best fit: a request takes the low end of the smallest segment that holds it whole; where none does, the largest
    segments until it is covered, which is the fewest pieces. Freed blocks merge with their neighbours. Finding a
    segment is O(log S) in the number of segments.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = 0
        self._length_at: dict[int, int] = {}  # segment start -> length
        self._start_before: dict[int, int] = {}  # segment end (exclusive) -> start
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
            blocks += self._take(start, min(length, missing))
        return blocks

    def allocate_after(self, block: int) -> int | None:
        """One block to grow by: the one that follows `block` if it is free, or else from the smallest segment."""
        if block + 1 in self._length_at:
            return self._take(block + 1, 1)[0]
        grown = self.allocate(1)
        return None if grown is None else grown[0]

    def free(self, blocks: list[int]) -> None:
        """Give blocks back, in any order. They must be allocated; that is the caller's to know."""
        ordered = sorted(blocks)
        i = 0
        while i < len(ordered):
            j = i + 1
            while j < len(ordered) and ordered[j] == ordered[j - 1] + 1:
                j += 1
            self._merge(ordered[i], j - i)
            i = j

    def segments(self) -> list[tuple[int, int]]:
        """(start, length) of every free segment, by start."""
        return sorted(self._length_at.items())

    def check_integrity(self) -> None:
        """Raise AssertionError unless segments are disjoint, maximal, inside the pool and counted right."""
        previous_end = -1
        for start, length in self.segments():
            assert length > 0 and start > previous_end, f"segment {start}+{length} touches the one before it"
            assert self._start_before[start + length] == start
            previous_end = start + length
        assert previous_end <= self.num_blocks
        assert self._by_length == sorted((length, start) for start, length in self._length_at.items())
        assert len(self._start_before) == len(self._length_at)
        assert self.num_free == sum(self._length_at.values())

    def _take(self, start: int, count: int) -> list[int]:
        length = self._remove(start)
        if count < length:
            self._insert(start + count, length - count)
        return list(range(start, start + count))

    def _merge(self, start: int, length: int) -> None:
        if start + length in self._length_at:
            length += self._remove(start + length)
        if start in self._start_before:
            before = self._start_before[start]
            length += self._remove(before)
            start = before
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        insort(self._by_length, (length, start))
        self.num_free += length

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        self.num_free -= length
        return length
