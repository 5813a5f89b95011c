import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flowkv.model.packing import pack

BLOCK_SIZE = 4


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=6))
def test_every_token_gets_its_position_and_the_slot_its_table_names(spans: list[tuple[int, int]]) -> None:
    tables = [
        [100 * item + index for index in range((start + count - 1) // 4 + 1)]
        for item, (start, count) in enumerate(spans)
    ]
    batch = pack([start for start, _ in spans], [count for _, count in spans], tables, BLOCK_SIZE)
    expected = [
        (position, tables[item][position // BLOCK_SIZE], position % BLOCK_SIZE)
        for item, (start, count) in enumerate(spans)
        for position in range(start, start + count)
    ]
    found = zip(batch.positions.tolist(), batch.slot_blocks.tolist(), batch.slot_offsets.tolist(), strict=True)
    assert list(found) == expected
    assert batch.context_tokens.tolist() == [start + count for start, count in spans]
    assert np.diff(batch.query_starts).tolist() == [count for _, count in spans]


def test_single_tokens_and_chunks_are_told_apart() -> None:
    batch = pack([9, 0, 3], [1, 5, 1], [[7, 8, 9], [1, 2], [3]], BLOCK_SIZE)
    assert batch.decode_items.tolist() == [0, 2]
    assert batch.decode_rows.tolist() == [0, 6]
    assert batch.chunk_items == (1,)
    assert batch.block_tables.tolist() == [[7, 8, 9], [1, 2, 0], [3, 0, 0]]
