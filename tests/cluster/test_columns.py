from hypothesis import given
from hypothesis import strategies as st

from flowkv.cluster.columns import Columns, Field

NAMES = [f"i{n}" for n in range(4)]


def values_of(number: int) -> tuple[float, ...]:
    return tuple(float(number * 100 + field) for field in Field)


def as_dict(columns: Columns) -> dict[str, tuple[float, ...]]:
    return {
        name: tuple(columns.column(field)[row] for field in Field) for row, name in enumerate(columns.names)
    }  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["add", "remove", "write"])), max_size=80))
def test_rows_are_what_was_written_whoever_came_and_went(steps: list[tuple[str, str]]) -> None:
    columns, expected = Columns(), dict[str, tuple[float, ...]]()
    for number, (name, what) in enumerate(steps):
        if what == "remove" and name in expected:
            columns.remove(name)
            del expected[name]
        elif what != "remove" and (what == "write") == (name in expected):
            if what == "add":
                columns.add(name)
            columns.write(name, values_of(number))
            expected[name] = values_of(number)
        assert len(columns) == len(columns.names) == len(expected)
        assert as_dict(columns) == expected


def test_more_instances_than_there_was_room_for_at_first() -> None:
    columns = Columns()
    for number in range(100):
        columns.add(f"i{number}")
        columns.write(f"i{number}", values_of(number))
    assert as_dict(columns) == {f"i{number}": values_of(number) for number in range(100)}


def test_a_column_is_a_view_that_what_is_written_shows_in() -> None:
    columns = Columns()
    columns.add("a")
    before = columns.column(Field.POOL_TOKENS)
    columns.write("a", values_of(7))
    assert before[0] == values_of(7)[Field.POOL_TOKENS]
