from flowkv.cluster.liveness import STALL_S, Liveness


def pass_seconds(liveness: Liveness, seconds: int, step_s: float = 0.0) -> list[str]:
    """What happens, second by second, as `second: what`."""
    seen = []
    for second in range(1, seconds + 1):
        if liveness.pass_time(1.0, STALL_S, step_s):
            seen.append(f"{second}: stalls")
        if liveness.take_hang(STALL_S):
            seen.append(f"{second}: hangs")
    return seen


def test_five_seconds_of_silence_are_a_stall_and_as_many_again_a_hang_which_is_said_again() -> None:
    assert pass_seconds(Liveness(), 21) == ["5: stalls", "10: hangs", "15: hangs", "20: hangs"]


def test_who_makes_long_steps_may_be_silent_for_ten_of_them() -> None:
    assert pass_seconds(Liveness(), 17, step_s=0.8) == ["8: stalls", "16: hangs"]


def test_a_word_is_enough_to_be_back() -> None:
    liveness = Liveness()
    assert pass_seconds(liveness, 9) == ["5: stalls"]
    liveness.heard()
    assert not liveness.is_stalled
    assert pass_seconds(liveness, 9) == ["5: stalls"]
