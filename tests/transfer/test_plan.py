import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.transfer.plan import Run, plan_runs


def test_parallel_stretches_become_one_run() -> None:
    assert plan_runs([5, 6, 7], [1, 2, 3]) == [Run(5, 1, 3)]


def test_a_break_on_either_side_ends_a_run() -> None:
    assert plan_runs([0, 1, 2, 8], [4, 5, 9, 10]) == [Run(0, 4, 2), Run(2, 9, 1), Run(8, 10, 1)]


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 source blocks"):
        plan_runs([1, 2], [1])


block_lists = st.integers(0, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 12), min_size=n, max_size=n) for _ in range(2)])
)


@given(block_lists)
def test_runs_cover_the_lists_in_order_and_cannot_be_fewer(lists: tuple[list[int], list[int]]) -> None:
    src, dst = lists
    runs = plan_runs(src, dst)
    covered = [(run.src_block + i, run.dst_block + i) for run in runs for i in range(run.num_blocks)]
    assert covered == list(zip(src, dst, strict=True))
    for before, after in itertools.pairwise(runs):
        joins_src = before.src_block + before.num_blocks == after.src_block
        assert not (joins_src and before.dst_block + before.num_blocks == after.dst_block)
