import msgspec
import pytest

from flowkv.server.records.journal import NUM_SLOWEST, SLOWEST_WINDOW_S, Journal
from flowkv.server.records.timeline import RequestRecord, State

RECORD = RequestRecord(
    request_id="r", arrived_at=0.0, state=State.FINISHED, prompt_tokens=1, output_tokens=1, num_choices=1,
    num_attempts=1, elapsed_s=1.0, unaccounted_s=0.0, phases=[],
)  # fmt: skip


def record(seconds: float, arrived_at: float = 0.0) -> RequestRecord:
    return msgspec.structs.replace(RECORD, elapsed_s=seconds, arrived_at=arrived_at)


def test_it_keeps_the_last_ones() -> None:
    journal = Journal(3)
    for seconds in (1.0, 5.0, 2.0, 4.0):
        journal.add(record(seconds))
    assert [kept.elapsed_s for kept in journal.recent] == [4.0, 2.0, 5.0]


def test_the_slowest_outlive_the_last_ones() -> None:
    journal = Journal(1)
    for seconds in range(100):
        journal.add(record(99.0 - seconds))
    assert [kept.elapsed_s for kept in journal.slowest(1.0)] == [99.0 - i for i in range(NUM_SLOWEST)]


@pytest.mark.parametrize("num_before", [1, NUM_SLOWEST])
def test_the_slowest_of_long_ago_make_room(num_before: int) -> None:
    journal = Journal(1)
    for _ in range(num_before):
        journal.add(record(50.0))
    later_at = SLOWEST_WINDOW_S + 1.0
    journal.add(record(1.0, later_at))
    assert [kept.elapsed_s for kept in journal.slowest(later_at)] == [1.0]


def test_everyone_hears_of_each() -> None:
    heard: list[RequestRecord] = []
    journal = Journal(1, [heard.append, heard.append])
    journal.add(RECORD)
    assert heard == [RECORD, RECORD]
