"""Who holds which block: block tables, reference counts, copy-on-write."""

from collections import Counter
from collections.abc import Iterable, Sequence

from flowkv.kv.compaction import Stretch, cheapest_window, stretches_within
from flowkv.kv.segments import SegmentAllocator

BlockCopy = tuple[int, int]  # (source block, destination block)


class BlockManager:
    """Reference counts over a `SegmentAllocator`.

    A block table is a plain list of block ids that its sequence owns; every entry is one reference. The manager never
    keeps tables itself, so there is one place where a sequence's blocks are written down. Few blocks are ever shared:
    only those are counted, so that the others cost nothing one by one.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._segments = SegmentAllocator(num_blocks)
        self._num_extra: dict[int, int] = {}  # references of a block beyond the first, where there are any

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
        return self._segments.allocate(num_blocks)

    def allocate_within(
        self, num_blocks: int, max_segments: int, movable: Sequence[list[int]]
    ) -> tuple[list[int], list[BlockCopy]] | None:
        """New blocks in at most `max_segments` segments, moving others out of the way, and the copies this takes.

        Blocks move only where there is no such place, the fewest that open one, and only out of tables in `movable`,
        which are changed in place; shared blocks stay. Until the copies are made, nobody may write into the new blocks
        or read through the changed tables. Where too much is in use by others, there are more segments and no copies.
        None (and no change) if there are too few free blocks.
        """
        if num_blocks <= self.num_free and self._segments.num_segments_for(num_blocks) > max_segments:
            opened = self._open_room(num_blocks, max_segments, movable)
            if opened is not None:
                return opened
        blocks = self.allocate(num_blocks)
        return None if blocks is None else (blocks, [])

    def fork(self, table: list[int]) -> list[int]:
        """A second table over the same blocks."""
        for block in table:
            self._num_extra[block] = self._num_extra.get(block, 0) + 1
        return list(table)

    def prepare_write(self, table: list[int], start: int, stop: int) -> list[BlockCopy] | None:
        """Make token positions `start` to `stop` (exclusive) of `table` writable, in place.

        Appends the blocks that are missing, and replaces shared ones. A single block comes from the high end of the
        pool, away from where whole prompts lie. Returns the copies to make before writing, or None (and no change) if
        there are too few free blocks.
        """
        size = self.block_size
        shared = [
            i for i in range(start // size, min(len(table), self.num_blocks_for(stop)))
            if table[i] in self._num_extra
        ]  # fmt: skip
        missing = max(0, self.num_blocks_for(stop) - len(table))
        if missing + len(shared) > self.num_free:
            return None
        copies = [(table[i], self._replace_shared(table, i)) for i in shared]
        self._append(table, missing)
        return copies

    def prepare_slot(self, table: list[int], position: int) -> Sequence[BlockCopy] | None:
        """`prepare_write` of one position, for which there mostly is nothing to do."""
        index = position // self.block_size
        if index < len(table) and table[index] not in self._num_extra:
            return ()
        return self.prepare_write(table, position, position + 1)

    def grow(self, tables: Sequence[list[int]], positions: Sequence[int], num_steps: int) -> int:
        """Make `num_steps` positions of each table writable, from one on that already is; as many as there is room for.

        The blocks go to the same tables as if every step made one position of each table writable, in this order.
        Returns the number of steps for which there is room, at least 1.
        """
        size = self.block_size
        growths = sorted(
            (step, i)
            for i, (table, position) in enumerate(zip(tables, positions, strict=True))
            for step in range(len(table) * size - position, num_steps, size)
        )
        if len(growths) > self.num_free:
            num_steps = growths[self.num_free][0]
            growths = [growth for growth in growths if growth[0] < num_steps]
        for (_, i), block in zip(growths, self._new_blocks(len(growths)), strict=True):
            tables[i].append(block)
        return num_steps

    def shrink(self, tables: Iterable[list[int]], lengths: Iterable[int]) -> None:
        """Give back what `grow` has added and nobody has written to: all beyond so many blocks of each table."""
        surplus: list[int] = []
        for table, length in zip(tables, lengths, strict=True):
            surplus += table[length:]
            del table[length:]
        self._segments.free(surplus)

    def free(self, table: list[int]) -> None:
        """Drop one reference of every entry and empty the table; blocks without any go back to the free segments."""
        unreferenced = [block for block in table if not self._drop_extra(block)] if self._num_extra else table
        self._segments.free(unreferenced)
        table.clear()

    def free_segments(self) -> list[tuple[int, int]]:
        """(start, length) of every maximal run of free blocks, by start."""
        return self._segments.segments()

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless `tables`, all there are, explain every reference and every used block."""
        self._segments.check_integrity()
        held = Counter(block for table in tables for block in table)
        free = {block for start, length in self._segments.segments() for block in range(start, start + length)}
        for block in range(self.num_blocks):
            num_references = 0 if block in free else 1 + self._num_extra.get(block, 0)
            assert num_references == held[block], f"block {block}: {num_references} counted, {held[block]} held"
        assert free.isdisjoint(self._num_extra)

    def _replace_shared(self, table: list[int], index: int) -> int:
        [new] = self._new_blocks(1)
        self._drop_extra(table[index])
        table[index] = new
        return new

    def _drop_extra(self, block: int) -> bool:
        """Drop one reference of a block that has more than one; False, and no change, if it has not."""
        num_extra = self._num_extra.get(block, 0)
        if num_extra > 1:
            self._num_extra[block] = num_extra - 1
        elif num_extra:
            del self._num_extra[block]
        return num_extra > 0

    def _append(self, table: list[int], count: int) -> None:
        if count == 1 and table:
            table += self._new_blocks(1)
        elif count:
            blocks = self.allocate(count)
            assert blocks is not None
            table += blocks

    def _new_blocks(self, count: int) -> list[int]:
        """To grow by."""
        blocks = self._segments.allocate_high(count)
        assert blocks is not None
        return blocks

    def _open_room(
        self, num_blocks: int, max_segments: int, movable: Sequence[list[int]]
    ) -> tuple[list[int], list[BlockCopy]] | None:
        """The largest free segments but one as they are, and for the rest a window that others leave; None if none can.

        There is always somewhere to go: what is free outside is at least what is used inside.
        """
        kept = self._segments.largest(max_segments - 1)
        size = num_blocks - sum(length for _, length in kept)
        others = [segment for segment in self._segments.segments() if segment not in kept]
        candidates = [block for table in movable for block in table if block not in self._num_extra]
        window = cheapest_window(self.num_blocks, others, candidates, size)
        if window is None:
            return None
        blocks = [block for start, length in kept for block in self._segments.claim(start, length)]
        copies = self._clear(window, window + size, movable)
        blocks += range(window, window + size)
        return blocks, copies

    def _clear(self, start: int, stop: int, movable: Sequence[list[int]]) -> list[BlockCopy]:
        """Take the blocks from `start` to `stop` (exclusive) from whoever has them; each keeps its one reference."""
        for segment, length in self._segments.segments():
            low, high = max(segment, start), min(segment + length, stop)
            if low < high:
                self._segments.claim(low, high - low)
        copies: list[BlockCopy] = []
        for table in movable:
            for stretch in list(stretches_within(table, start, stop)):
                copies += self._move(table, stretch)
        return copies

    def _move(self, table: list[int], stretch: Stretch) -> list[BlockCopy]:
        old = table[stretch.start : stretch.stop]
        new = self._segments.allocate(len(old))
        assert new is not None
        table[stretch.start : stretch.stop] = new
        return list(zip(old, new, strict=True))
