from hypothesis import given
from hypothesis import strategies as st

from flowkv.sim.loop import Loop


def run(loop: Loop) -> None:
    while loop.step():
        pass


def test_what_is_due_first_happens_first_whenever_it_was_put_down() -> None:
    loop, seen = Loop(), list[tuple[float, str]]()

    def note(text: str) -> None:
        seen.append((loop.now_s, text))

    loop.at(3.0, note, "third")
    loop.after(1.0, note, "first")
    loop.at(2.0, note, "second")
    run(loop)
    assert seen == [(1.0, "first"), (2.0, "second"), (3.0, "third")]
    assert loop.num_events == 3 and not loop.step()


def test_what_is_put_down_on_the_way_takes_its_place() -> None:
    loop, seen = Loop(), list[tuple[float, int]]()

    def again(left: int) -> None:
        seen.append((loop.now_s, left))
        if left:
            loop.after(0.5, again, left - 1)

    loop.at(1.0, again, 3)
    loop.at(1.7, seen.append, (1.7, -1))
    run(loop)
    assert seen == [(1.0, 3), (1.5, 2), (1.7, -1), (2.0, 1), (2.5, 0)]


def test_the_past_is_now() -> None:
    loop, seen = Loop(), list[float]()

    def late() -> None:
        loop.at(1.0, lambda: seen.append(loop.now_s))

    loop.at(5.0, late)
    run(loop)
    assert seen == [5.0]


@given(st.lists(st.integers(0, 5), max_size=40))
def test_events_of_one_time_happen_in_the_order_in_which_they_were_put_down(times: list[int]) -> None:
    loop, seen = Loop(), list[tuple[int, int]]()
    for number, time_s in enumerate(times):
        loop.at(float(time_s), seen.append, (time_s, number))
    run(loop)
    assert seen == sorted((time_s, number) for number, time_s in enumerate(times))
