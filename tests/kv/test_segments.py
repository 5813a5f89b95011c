import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from flowkv.kv.segments import SegmentAllocator

NUM_BLOCKS = 40


def test_a_whole_request_lies_in_the_smallest_segment_that_holds_it() -> None:
    allocator = SegmentAllocator(20)
    blocks = allocator.allocate(20)
    assert blocks == list(range(20))
    allocator.free([2, 3, 4])
    allocator.free([10, 11, 12, 13, 14])
    assert allocator.allocate(3) == [2, 3, 4]
    assert allocator.allocate(2) == [10, 11]


def test_without_such_a_segment_the_fewest_pieces_are_taken() -> None:
    allocator = SegmentAllocator(20)
    allocator.allocate(20)
    allocator.free([0, 5, 6, 10, 11, 12, 15])
    assert allocator.allocate(4) == [10, 11, 12, 0]


def test_too_few_blocks_change_nothing() -> None:
    allocator = SegmentAllocator(4)
    assert allocator.allocate(5) is None
    assert allocator.segments() == [(0, 4)]


def test_growth_comes_from_the_high_end() -> None:
    allocator = SegmentAllocator(10)
    assert allocator.allocate(3) == [0, 1, 2]
    assert allocator.allocate_high(2) == [9, 8]
    assert allocator.allocate(5) == [3, 4, 5, 6, 7]
    assert allocator.allocate_high(1) is None
    allocator.free([0, 1, 5])
    assert allocator.allocate_high(4) is None
    assert allocator.allocate_high(2) == [5, 1]
    assert allocator.segments() == [(0, 1)]


def test_only_free_blocks_can_be_claimed() -> None:
    allocator = SegmentAllocator(10)
    assert allocator.claim(4, 3) == [4, 5, 6]
    assert allocator.segments() == [(0, 4), (7, 3)]
    with pytest.raises(AssertionError, match="not all free"):
        allocator.claim(2, 3)
    with pytest.raises(AssertionError, match="not all free"):
        allocator.claim(5, 1)


def test_the_largest_segments_come_first() -> None:
    allocator = SegmentAllocator(10)
    allocator.claim(1, 1)
    allocator.claim(8, 1)
    assert allocator.largest(0) == []
    assert allocator.largest(2)[0] == (2, 6)
    assert len(allocator.largest(9)) == 3


def test_freed_neighbours_merge_in_any_order() -> None:
    allocator = SegmentAllocator(9)
    allocator.allocate(9)
    order = list(range(9))
    random.Random(0).shuffle(order)
    for block in order:
        allocator.free([block])
        allocator.check_integrity()
    assert allocator.segments() == [(0, 9)]


@given(st.lists(st.integers(1, 9), max_size=30), st.randoms(use_true_random=False))
def test_allocate_takes_no_more_segments_than_it_must(sizes: list[int], rng: random.Random) -> None:
    allocator = SegmentAllocator(NUM_BLOCKS)
    held: list[list[int]] = []
    for size in sizes:
        if held and rng.random() < 0.5:
            allocator.free(held.pop(rng.randrange(len(held))))
        num_segments = allocator.num_segments_for(size)
        lengths = sorted((length for _, length in allocator.segments()), reverse=True)
        blocks = allocator.allocate(size)
        if blocks is None:
            assert sum(lengths) < size
            continue
        held.append(blocks)
        pieces = 1 + sum(b != a + 1 for a, b in itertools.pairwise(blocks))
        fewest = next(k for k in range(1, len(lengths) + 1) if sum(lengths[:k]) >= size)
        assert pieces <= fewest == num_segments


class Segments(RuleBasedStateMachine):
    """Against a plain set of free blocks."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = SegmentAllocator(NUM_BLOCKS)
        self.free_blocks = set(range(NUM_BLOCKS))

    @rule(target=held, size=st.integers(0, 12))
    def allocate(self, size: int) -> object:
        blocks = self.allocator.allocate(size)
        if blocks is None:
            assert size > len(self.free_blocks)
            return multiple()
        assert len(blocks) == size and set(blocks) <= self.free_blocks
        self.free_blocks -= set(blocks)
        return blocks

    @rule(blocks=held, count=st.integers(0, 5))
    def grow(self, blocks: list[int], count: int) -> None:
        grown = self.allocator.allocate_high(count)
        if grown is None:
            assert count > len(self.free_blocks)
            return
        assert grown == sorted(self.free_blocks, reverse=True)[:count]
        self.free_blocks -= set(grown)
        blocks += grown

    @rule(target=held, data=st.data())
    def claim(self, data: st.DataObject) -> object:
        if not self.allocator.segments():
            return multiple()
        start, length = data.draw(st.sampled_from(self.allocator.segments()))
        offset = data.draw(st.integers(0, length - 1))
        blocks = self.allocator.claim(start + offset, data.draw(st.integers(1, length - offset)))
        assert set(blocks) <= self.free_blocks
        self.free_blocks -= set(blocks)
        return blocks

    @rule(blocks=consumes(held))
    def free(self, blocks: list[int]) -> None:
        self.allocator.free(blocks)
        self.free_blocks |= set(blocks)

    @invariant()
    def agrees(self) -> None:
        self.allocator.check_integrity()
        assert {b for start, n in self.allocator.segments() for b in range(start, start + n)} == self.free_blocks


TestSegments = Segments.TestCase
