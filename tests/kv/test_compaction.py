from hypothesis import given
from hypothesis import strategies as st

from flowkv.kv.compaction import cheapest_window, stretches_within

FREE, MOVABLE, FIXED = range(3)


def window(pool: list[int], size: int) -> int | None:
    segments = [(block, 1) for block, state in enumerate(pool) if state == FREE]
    return cheapest_window(len(pool), segments, [b for b, state in enumerate(pool) if state == MOVABLE], size)


@given(st.lists(st.sampled_from([FREE, MOVABLE, FIXED]), min_size=1, max_size=20), st.integers(0, 22))
def test_the_window_is_the_cheapest_there_is(pool: list[int], size: int) -> None:
    windows = {
        start: pool[start : start + size].count(MOVABLE)
        for start in range(len(pool) - size + 1)
        if size and FIXED not in pool[start : start + size]
    }
    found = window(pool, size)
    assert found == (min(windows, key=lambda start: (windows[start], start)) if windows else None)


def test_stretches_are_cut_where_blocks_or_window_end() -> None:
    table = [3, 4, 5, 9, 6, 7, 1, 2, 3]
    assert [tuple(stretch) for stretch in stretches_within(table, 4, 7)] == [(1, 3), (4, 5)]
    assert list(stretches_within(table, 10, 20)) == []
