from flowkv.launch.timers import Timers


def test_what_is_due_is_done_once_and_what_is_not_stays() -> None:
    timers, done = Timers(), list[str]()
    assert timers.next_s(0.0) is None
    timers.at(2.0, lambda: done.append("later"))
    timers.at(1.0, lambda: done.append("soon"))
    assert timers.next_s(0.0) == 1.0
    timers.run_due(0.9)
    assert done == []
    timers.run_due(1.0)
    timers.run_due(1.5)
    assert done == ["soon"]
    assert timers.next_s(5.0) == 0.0
    timers.clear()
    timers.run_due(9.0)
    assert done == ["soon"] and timers.next_s(9.0) is None


def test_what_is_done_may_ask_for_more() -> None:
    timers, done = Timers(), list[int]()
    timers.at(1.0, lambda: timers.at(1.0, lambda: done.append(1)))
    timers.run_due(1.0)
    assert done == []
    timers.run_due(1.0)
    assert done == [1]
