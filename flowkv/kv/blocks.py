"""Who holds which block: block tables, reference counts, copy-on-write."""

from collections import Counter
from collections.abc import Iterable

from flowkv.kv.segments import SegmentAllocator

BlockCopy = tuple[int, int]  # (source block, destination block)


class BlockManager:
    """Reference counts over a `SegmentAllocator`.

    A block table is a plain list of block ids that its sequence owns; every entry is one reference. The manager never
    keeps tables itself, so there is one place where a sequence's blocks are written down.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._segments = SegmentAllocator(num_blocks)
        self._num_references = [0] * num_blocks

    @property
    def num_blocks(self) -> int:
        return self._segments.num_blocks

    @property
    def num_free(self) -> int:
        return self._segments.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """New blocks, each with one reference, or None if there are too few."""
        blocks = self._segments.allocate(num_blocks)
        for block in blocks or ():
            self._num_references[block] = 1
        return blocks

    def fork(self, table: list[int]) -> list[int]:
        """A second table over the same blocks."""
        for block in table:
            self._num_references[block] += 1
        return list(table)

    def prepare_write(self, table: list[int], start: int, stop: int) -> list[BlockCopy] | None:
        """Make token positions `start` to `stop` (exclusive) of `table` writable, in place.

        Appends the blocks that are missing, each next to its predecessor where that is free, and replaces shared ones.
        Returns the copies to make before writing, or None (and no change) if there are too few free blocks.
        """
        size = self.block_size
        shared = [
            i for i in range(start // size, min(len(table), self.num_blocks_for(stop)))
            if self._num_references[table[i]] > 1
        ]  # fmt: skip
        missing = max(0, self.num_blocks_for(stop) - len(table))
        if missing + len(shared) > self.num_free:
            return None
        copies = [(table[i], self._replace_shared(table, i)) for i in shared]
        self._append(table, missing)
        return copies

    def free(self, table: list[int]) -> None:
        """Drop one reference of every entry and empty the table; blocks without any go back to the free segments."""
        unreferenced = []
        for block in table:
            self._num_references[block] -= 1
            assert self._num_references[block] >= 0, f"block {block} was freed twice"
            if self._num_references[block] == 0:
                unreferenced.append(block)
        table.clear()
        self._segments.free(unreferenced)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless `tables`, all there are, explain every reference and every used block."""
        self._segments.check_integrity()
        held = Counter(block for table in tables for block in table)
        for block, num_references in enumerate(self._num_references):
            assert num_references == held[block], f"block {block}: {num_references} counted, {held[block]} held"
        assert self.num_free == self.num_blocks - len(held)
        for start, length in self._segments.segments():
            assert not any(self._num_references[start : start + length]), f"segment at {start} holds a used block"

    def _replace_shared(self, table: list[int], index: int) -> int:
        new = self._new_block(after=table[index - 1] if index else None)
        self._num_references[table[index]] -= 1
        table[index] = new
        return new

    def _append(self, table: list[int], count: int) -> None:
        if count > 1:
            blocks = self.allocate(count)
            assert blocks is not None
            table += blocks
        elif count == 1:
            table.append(self._new_block(after=table[-1] if table else None))

    def _new_block(self, after: int | None) -> int:
        blocks = self._segments.allocate(1) if after is None else [self._segments.allocate_after(after)]
        assert blocks is not None and blocks[0] is not None
        self._num_references[blocks[0]] = 1
        return blocks[0]
