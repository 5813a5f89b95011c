import pytest

from flowkv.errors import RequestError
from flowkv.server.recovery import MAX_FRUITLESS, PATIENCE_S, TOKENS_A_DEATH, Recovery


def test_each_attempt_has_an_id_of_its_own_and_names_the_one_before() -> None:
    recovery = Recovery("r")
    assert [(recovery.lose(0, 0.0, died=True), recovery.resumes) for _ in range(3)] == [
        ("r~1", "r"), ("r~2", "r~1"), ("r~3", "r~2"),
    ]  # fmt: skip


def test_progress_is_what_makes_another_attempt_worth_it() -> None:
    recovery = Recovery("r")
    for num_tokens in range(0, 500, 50):
        recovery.lose(num_tokens, 0.0, died=True)
    for _ in range(MAX_FRUITLESS - 1):
        recovery.lose(450, 0.0, died=True)
    with pytest.raises(RequestError, match="instances failed"):
        recovery.lose(450, 0.0, died=True)


def test_a_request_that_kills_with_every_token_is_ended_too() -> None:
    recovery = Recovery("r")
    with pytest.raises(RequestError, match="instances failed"):
        for num_tokens in range(100):
            recovery.lose(num_tokens, 0.0, died=True)
    long = Recovery("long")
    for num_deaths in range(50):
        long.lose(num_deaths * TOKENS_A_DEATH, 0.0, died=True)


def test_what_was_lost_otherwise_is_not_the_requests_fault() -> None:
    recovery = Recovery("r")
    for _ in range(100):
        recovery.lose(0, 0.0, died=False)


def test_patience_is_for_what_was_accepted_and_ends_when_something_is_heard() -> None:
    recovery = Recovery("r")
    recovery.check_patience(10 * PATIENCE_S)
    recovery.lose(0, 100.0, died=True)
    recovery.check_patience(100.0 + PATIENCE_S - 1)
    recovery.heard(100.0)
    recovery.check_patience(100.0 + 2 * PATIENCE_S)
    recovery.waits(500.0)
    with pytest.raises(RequestError) as raised:
        recovery.check_patience(500.0 + PATIENCE_S)
    assert raised.value.status == 503


def test_a_gap_that_stays_and_silence_are_noticed() -> None:
    recovery = Recovery("r")
    recovery.heard(1.0)
    assert not recovery.is_broken(True, 1.0)
    assert not recovery.is_broken(False, 20.0)
    assert not recovery.is_broken(True, 21.0)
    assert recovery.is_broken(True, 25.0)
    assert not recovery.is_silent(5.0) and recovery.is_silent(12.0)
