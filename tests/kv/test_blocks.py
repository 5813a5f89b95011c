import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from flowkv.kv.blocks import BlockCopy, BlockManager


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    blocks = BlockManager(8, block_size=4)
    table: list[int] = []
    assert blocks.prepare_write(table, 0, 6) == []
    fork = blocks.fork(table)
    copies = blocks.prepare_write(fork, 6, 7)
    assert copies == [(1, fork[1])]
    assert fork[0] == table[0] and fork[1] != table[1]
    assert blocks.prepare_write(table, 6, 7) == []  # the last holder writes in place
    blocks.check_integrity([table, fork])


def test_a_prompt_lies_low_and_growth_high() -> None:
    blocks = BlockManager(16, block_size=2)
    table: list[int] = []
    blocks.prepare_write(table, 0, 6)
    for position in range(6, 10):
        blocks.prepare_write(table, position, position + 1)
    assert table == [0, 1, 2, 15, 14]
    short: list[int] = []
    blocks.prepare_write(short, 0, 1)
    assert short == [3]


def checkerboard(num_blocks: int) -> tuple[BlockManager, list[list[int]]]:
    """A pool whose odd blocks are held, each by its own table, and whose even ones are free."""
    blocks = BlockManager(num_blocks, block_size=2)
    tables = [blocks.allocate(1) or [] for _ in range(num_blocks)]
    for table in tables[::2]:
        blocks.free(table)
    return blocks, tables[1::2]


def test_blocks_move_out_of_the_way() -> None:
    blocks, held = checkerboard(8)
    allocated = blocks.allocate_within(3, 1, held)
    assert allocated is not None
    new, copies = allocated
    assert new == [0, 1, 2] and len(copies) == 1  # two free blocks and one that had to leave
    assert copies[0][0] == 1 and held[0] == [copies[0][1]]
    blocks.check_integrity([new, *held])


def test_nothing_moves_where_few_segments_are_enough() -> None:
    blocks, held = checkerboard(8)
    allocated = blocks.allocate_within(3, 3, held)
    assert allocated is not None
    assert len(allocated[0]) == 3 and allocated[1] == []
    assert held == [[1], [3], [5], [7]]


def test_segments_that_are_there_are_used_before_others_are_opened() -> None:
    blocks, held = checkerboard(8)
    blocks.free(held.pop(0))  # blocks 0 to 2 are one segment now
    allocated = blocks.allocate_within(5, 2, held)
    assert allocated is not None
    new, copies = allocated
    assert new[:3] == [0, 1, 2] and len(copies) == 1
    blocks.check_integrity([new, *held])


def test_only_tables_that_are_named_move() -> None:
    blocks, held = checkerboard(8)
    allocated = blocks.allocate_within(3, 1, held[2:])
    assert allocated is not None
    assert allocated[0] == [4, 5, 6]
    assert held[:2] == [[1], [3]]


def test_shared_blocks_stay_where_they_are() -> None:
    blocks, held = checkerboard(6)
    forks = [blocks.fork(table) for table in held]
    allocated = blocks.allocate_within(3, 1, held)
    assert allocated is not None
    assert sorted(allocated[0]) == [0, 2, 4] and allocated[1] == []
    blocks.check_integrity([allocated[0], *held, *forks])


def test_too_few_free_blocks_move_nothing() -> None:
    blocks, held = checkerboard(6)
    assert blocks.allocate_within(4, 1, held) is None
    assert held == [[1], [3], [5]]
    blocks.check_integrity(held)


def test_without_room_nothing_changes() -> None:
    blocks = BlockManager(3, block_size=2)
    table: list[int] = []
    blocks.prepare_write(table, 0, 4)
    fork = blocks.fork(table)
    assert blocks.prepare_write(fork, 2, 6) is None  # one copy and one new block, but only one is free
    assert fork == table
    blocks.check_integrity([table, fork])


def test_integrity_notices_a_lost_table() -> None:
    blocks = BlockManager(4, block_size=2)
    table: list[int] = []
    blocks.prepare_write(table, 0, 4)
    with pytest.raises(AssertionError, match="block 0"):
        blocks.check_integrity([])


def test_freeing_twice_is_noticed() -> None:
    blocks = BlockManager(4, block_size=2)
    table = blocks.allocate(2)
    assert table is not None
    stale = list(table)
    blocks.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(stale)


class Blocks(RuleBasedStateMachine):
    """Tables with contents: what a table reads must be what was written through it, whoever shares its blocks."""

    tables = Bundle("tables")
    SIZE = 3

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(20, self.SIZE)
        self.memory: dict[tuple[int, int], int] = {}
        self.live: list[tuple[list[int], list[int]]] = []  # (table, what it should read)
        self.counter = 0

    def copy(self, copies: list[BlockCopy]) -> None:
        """All at once, as a vectorised copy would: no copy of one call may need another to be made first."""
        moved = [(dst, slot, self.memory.get((src, slot), -1)) for src, dst in copies for slot in range(self.SIZE)]
        self.memory.update({(dst, slot): value for dst, slot, value in moved})

    def fill(self, block: int) -> None:
        for slot in range(self.SIZE):
            self.counter += 1
            self.memory[block, slot] = self.counter

    @rule(target=tables)
    def new(self) -> object:
        entry: tuple[list[int], list[int]] = ([], [])
        self.live.append(entry)
        return entry

    @rule(entry=tables, count=st.integers(1, 8))
    def write(self, entry: tuple[list[int], list[int]], count: int) -> None:
        table, values = entry
        start = len(values)
        free_before = self.blocks.num_free
        copies = self.blocks.prepare_write(table, start, start + count)
        if copies is None:
            assert self.blocks.num_free == free_before
            return
        self.copy(copies)
        for position in range(start, start + count):
            self.counter += 1
            self.memory[table[position // self.SIZE], position % self.SIZE] = self.counter
            values.append(self.counter)

    @rule(target=tables, num_blocks=st.integers(1, 8), max_segments=st.integers(1, 3), data=st.data())
    def allocate_within(self, num_blocks: int, max_segments: int, data: st.DataObject) -> object:
        movable = [table for table, _ in self.live if data.draw(st.booleans())]
        lengths = sorted((length for _, length in self.blocks.free_segments()), reverse=True)
        before = [list(table) for table, _ in self.live]
        allocated = self.blocks.allocate_within(num_blocks, max_segments, movable)
        if allocated is None:
            assert sum(lengths) < num_blocks
            return multiple()
        new, copies = allocated
        assert len(new) == num_blocks
        self._check_moves(before, movable, {src for src, _ in copies})
        if copies:
            assert sum(lengths[:max_segments]) < num_blocks  # it was needed,
            assert 1 + sum(b != a + 1 for a, b in itertools.pairwise(new)) <= max_segments  # and enough
        self.copy(copies)
        for block in new:  # whoever gets them may write at once
            self.fill(block)
        entry = (new, [self.memory[block, slot] for block in new for slot in range(self.SIZE)])
        self.live.append(entry)
        return entry

    def _check_moves(self, before: list[list[int]], movable: list[list[int]], sources: set[int]) -> None:
        for old, (table, _) in zip(before, self.live, strict=True):
            moved = {block for block, now in zip(old, table, strict=True) if block != now}
            assert moved <= sources and (not moved or any(table is other for other in movable))

    @rule(target=tables, entry=tables)
    def fork(self, entry: tuple[list[int], list[int]]) -> object:
        if len(self.live) > 6:
            return multiple()
        child = (self.blocks.fork(entry[0]), list(entry[1]))
        self.live.append(child)
        return child

    @rule(entry=consumes(tables))
    def free(self, entry: tuple[list[int], list[int]]) -> None:
        self.live = [other for other in self.live if other is not entry]
        self.blocks.free(entry[0])

    @invariant()
    def every_table_reads_what_it_wrote(self) -> None:
        self.blocks.check_integrity([table for table, _ in self.live])
        for table, values in self.live:
            read = [self.memory[table[i // self.SIZE], i % self.SIZE] for i in range(len(values))]
            assert read == values


TestBlocks = Blocks.TestCase


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_growing_ahead_is_growing_step_by_step(data: st.DataObject) -> None:
    """The same blocks in the same tables, as far as single steps would have come without preempting anyone."""
    num_blocks, num_steps = data.draw(st.integers(4, 20)), data.draw(st.integers(1, 30))
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    ahead, single = BlockManager(num_blocks, 4), BlockManager(num_blocks, 4)
    tables: tuple[list[list[int]], list[list[int]]] = ([], [])
    for blocks, mine in zip((ahead, single), tables, strict=True):
        for length in lengths:
            table: list[int] = []
            assume(blocks.prepare_write(table, 0, length + 1) == [])
            mine.append(table)
    planned = ahead.grow(tables[0], lengths, num_steps)
    made = data.draw(st.integers(1, planned))
    ahead.shrink(tables[0], [ahead.num_blocks_for(length + made) for length in lengths])
    for step in range(made):
        for table, length in zip(tables[1], lengths, strict=True):
            assert single.prepare_slot(table, length + step) is not None
    assert tables[0] == tables[1]
    assert ahead.free_segments() == single.free_segments()
    ahead.check_integrity(tables[0])
    if made == planned < num_steps:
        assert None in [single.prepare_slot(t, n + made) for t, n in zip(tables[1], lengths, strict=True)]
