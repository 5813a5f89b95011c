from flowkv.cluster.settled import KEEP_MOST, KEEP_S, Settled
from flowkv.messages import Accepted


def test_an_answer_is_kept_for_a_time_and_then_forgotten() -> None:
    settled = Settled()
    settled.pass_time(100.0)
    settled.remember(Accepted("r"))
    settled.pass_time(100.0 + KEEP_S)
    assert settled.get("r") == Accepted("r")
    settled.pass_time(100.0 + 2 * KEEP_S)
    assert settled.get("r") is None and len(settled) == 0


def test_however_many_come_only_so_many_are_kept() -> None:
    settled = Settled()
    for number in range(5 * KEEP_MOST):
        settled.remember(Accepted(str(number)))
        assert len(settled) <= 2 * KEEP_MOST
    assert all(settled.get(str(number)) for number in range(4 * KEEP_MOST, 5 * KEEP_MOST))
