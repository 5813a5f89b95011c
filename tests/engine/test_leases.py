from flowkv.engine.leases import LeaseClock, Watches

LEASE_S = 3.0


def test_time_in_which_one_was_stopped_counts_as_a_beat() -> None:
    clock = LeaseClock(LEASE_S)
    assert [clock.elapsed_s(now_s) for now_s in (10.0, 10.5, 100.0, 101.0)] == [0.0, 0.5, 1.0, 1.0]


def test_long_steps_make_a_long_lease_for_a_while() -> None:
    clock = LeaseClock(LEASE_S)
    clock.stepped(0.1)
    assert clock.lease_s == LEASE_S
    clock.stepped(2.0)
    assert clock.lease_s == 8.0
    for _ in range(100):
        clock.stepped(0.1)
    assert clock.lease_s == LEASE_S


def test_renewals_are_due_once_a_beat_for_each_peer() -> None:
    watches = Watches(LeaseClock(LEASE_S))
    assert watches.tick(0.5, ["a"]) == []
    assert watches.tick(0.5, ["a", "b"]) == ["a"]
    assert watches.tick(0.5, ["a", "b"]) == ["b"]


def test_silence_is_counted_only_while_something_is_open() -> None:
    watches = Watches(LeaseClock(LEASE_S))
    for _ in range(3):
        watches.tick(1.0, ["a"])
    assert watches.is_silent("a") and not watches.is_silent("b")
    watches.tick(1.0, [])
    watches.tick(1.0, ["a"])
    assert not watches.is_silent("a")
