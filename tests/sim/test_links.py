import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.sim.links import LinkModel
from flowkv.transfer.plan import Run

BYTES_PER_S, CALL_S, BLOCK_BYTES = 1e6, 0.01, 1000


def model() -> LinkModel:
    return LinkModel(BYTES_PER_S, CALL_S)


def runs(*num_blocks: int) -> list[Run]:
    return [Run(0, 0, n) for n in num_blocks]


def test_a_write_takes_its_calls_and_its_bytes() -> None:
    begin_s, end_s = model().write("a", "b", runs(5, 10), BLOCK_BYTES, 7.0)
    assert begin_s == 7.0
    assert end_s - begin_s == pytest.approx(2 * CALL_S + 15 * BLOCK_BYTES / BYTES_PER_S)


def test_what_lies_together_moves_faster() -> None:
    _, together_s = model().write("a", "b", runs(12), BLOCK_BYTES, 0.0)
    _, scattered_s = model().write("a", "b", runs(*[1] * 12), BLOCK_BYTES, 0.0)
    assert scattered_s - together_s == pytest.approx(11 * CALL_S)


def test_writes_that_share_a_port_wait_and_others_do_not() -> None:
    links = model()
    _, first_s = links.write("a", "b", runs(100), BLOCK_BYTES, 0.0)
    assert links.write("a", "c", runs(1), BLOCK_BYTES, 0.0)[0] == first_s  # the same source
    assert links.write("d", "b", runs(1), BLOCK_BYTES, 0.0)[0] == first_s  # the same target
    assert links.write("e", "f", runs(1), BLOCK_BYTES, 0.0)[0] == 0.0
    assert links.write("b", "a", runs(1), BLOCK_BYTES, 0.0)[0] == 0.0  # the other direction


def test_one_that_is_gone_leaves_nothing_behind() -> None:
    links = model()
    links.write("a", "b", runs(100), BLOCK_BYTES, 0.0)
    links.forget("a")
    links.forget("b")
    assert links.write("a", "b", runs(1), BLOCK_BYTES, 0.0)[0] == 0.0


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(1, 50), st.integers(0, 100)), max_size=30
    )
)
def test_no_port_is_ever_in_two_writes_at_once(posted: list[tuple[str, str, int, int]]) -> None:
    links, taken = model(), dict[str, float]()
    for source, target, num_blocks, now in sorted(posted, key=lambda post: post[3]):
        begin_s, end_s = links.write(source, target, runs(num_blocks), BLOCK_BYTES, now / 100)
        assert begin_s >= max(now / 100, taken.get(source, 0.0), taken.get(target, 0.0))
        assert begin_s in (now / 100, taken.get(source), taken.get(target))  # no longer than needed
        taken[source] = taken[target] = end_s
