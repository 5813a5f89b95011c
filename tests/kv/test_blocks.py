import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from flowkv.kv.blocks import BlockManager


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


def test_growth_stays_contiguous() -> None:
    blocks = BlockManager(16, block_size=2)
    table: list[int] = []
    blocks.prepare_write(table, 0, 6)
    for position in range(6, 14):
        blocks.prepare_write(table, position, position + 1)
    assert table == list(range(7))


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
        for src, dst in copies:
            for slot in range(self.SIZE):
                self.memory[dst, slot] = self.memory.get((src, slot), -1)
        for position in range(start, start + count):
            self.counter += 1
            self.memory[table[position // self.SIZE], position % self.SIZE] = self.counter
            values.append(self.counter)

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
