import gzip
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmarks import BenchmarkError, churn
from benchmarks.churn import DESIGNS, Case, FreeList, GrowthBehind, Managed, Pool, Replay, Request
from benchmarks.report import ROOT
from flowkv.transfer.plan import plan_runs

NUM_REQUESTS = 300
SMALL = [Request(1 + 37 * i % 900, 1 + 11 * i % 90) for i in range(1, 60)]


def replayed(design: str, order: str = "random", occupancy: float = 0.9) -> Replay:
    case = Case("made up", 200, order, design, NUM_REQUESTS, occupancy, seed=1)
    replay = Replay(case, churn.repeated(SMALL, case.seed))
    replay.run(NUM_REQUESTS)
    return replay


@pytest.mark.parametrize("order", churn.ORDERS)
def test_every_design_sees_the_same_events(order: str) -> None:
    replays = [replayed(design, order) for design in DESIGNS]
    for replay in replays:
        assert len(replay.record.runs) == NUM_REQUESTS
        for name in ("prefill_live_fraction", "decode_live_fraction"):
            assert replay.record.samples[name] == replays[0].record.samples[name]
        assert replay.record.num_blocks == replays[0].record.num_blocks
        grown = [len(r.decode.times_us["grow"]) for r in (replay, replays[0])]
        assert grown[0] == grown[1] > NUM_REQUESTS  # outputs are about three blocks long


@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_live_is_what_is_not_free(design: str) -> None:
    replay = replayed(design)
    for side in (replay.prefill, replay.decode):
        assert side.num_live + sum(length for _, length in side.pool.free_segments()) == side.num_blocks
    held = [block for held in replay._decoding.values() for block in held.table]
    assert len(held) == len(set(held)) == replay.decode.num_live


def test_admissions_stay_within_the_occupancy_and_fill_it() -> None:
    live = replayed("segments").record.samples["prefill_live_fraction"]
    assert max(live) <= 0.9
    assert sum(live) / len(live) > 0.7


def test_in_order_of_arrival_the_oldest_leaves() -> None:
    replay = replayed("segments", "arrival")
    admitted = list(islice(churn.repeated(SMALL, 1), NUM_REQUESTS + len(replay._waiting)))
    assert [held.request for held in replay._waiting] == admitted[NUM_REQUESTS:]


def test_growth_is_one_token_a_step_until_the_output_ends() -> None:
    """17 prompt tokens are two blocks; 31 steps write positions 17 to 47, which takes one block more."""
    grown = []
    for num_output_tokens in (16, 17, 32, 33):
        case = Case("made up", 100, "arrival", "segments")
        replay = Replay(case, iter([Request(17, num_output_tokens)] * 100))
        replay.run(1)
        while replay._events:
            replay._advance()
        grown.append(len(replay.decode.times_us["grow"]))
        assert replay.decode.num_live == 0
    assert grown == [0, 1, 1, 2]


def test_moves_keep_requests_in_few_segments() -> None:
    without, moved = replayed("segments"), replayed("segments, moves")
    for name in ("src_segments", "dst_segments"):
        assert sum(n > 2 for n in getattr(moved.record, name)) < sum(n > 2 for n in getattr(without.record, name))
    assert moved.prefill.pool.num_moved > 0 and moved.decode.pool.num_moved > 0
    assert without.prefill.pool.num_moved == without.decode.pool.num_moved == 0


def test_what_is_being_written_or_is_about_to_leave_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables seen by `allocate`: on P neither the newest nor the next to leave, on D none of this step."""
    offered: list[tuple[bool, list[list[int]]]] = []
    case = Case("made up", 200, "random", "segments", NUM_REQUESTS)
    replay = Replay(case, churn.repeated(SMALL, 1))
    for side in (replay.prefill, replay.decode):
        allocate = side.pool.allocate

        def spy(
            num_blocks: int, movable: list[list[int]], is_decode: bool = side is replay.decode, do: Any = allocate
        ) -> list[int]:
            fixed = [h.table for h in replay._decoding.values() if h.admitted_step == replay._step]
            if not is_decode:
                fixed = [held.table for held in [replay._next, *replay._waiting[-1:]] if held is not None]
            assert not any(table is other for table in movable for other in fixed)
            offered.append((is_decode, movable))
            return do(num_blocks, movable)  # type: ignore[no-any-return]

        monkeypatch.setattr(side.pool, "allocate", spy)
    replay.run(NUM_REQUESTS)
    assert max(len(movable) for is_decode, movable in offered if is_decode) > 1
    assert max(len(movable) for is_decode, movable in offered if not is_decode) > 1


def test_a_decode_pool_that_is_full_ends_requests_and_counts_them() -> None:
    replay = replayed("segments", occupancy=1.0)
    assert replay.record.num_cut > 0


def test_the_order_in_which_vllm_frees_turns_blocks_around() -> None:
    assert churn_once(lambda: FreeList(4, last_first=True)) == [3, 2, 1, 0]
    assert churn_once(lambda: FreeList(4, last_first=False)) == [0, 1, 2, 3]


def churn_once(make: Callable[[], Pool]) -> list[int]:
    pool = make()
    pool.free(pool.allocate(4, []))
    return pool.allocate(4, [])


def test_growth_goes_behind_or_to_the_far_end() -> None:
    table = [0, 1]
    behind, far = GrowthBehind(8), Managed(8, moves=False)
    for pool in (behind, far):
        assert pool.allocate(2, []) == table
    mine, others = list(table), list(table)
    behind.grow(mine)
    far.grow(others)
    assert (mine, others) == ([0, 1, 2], [0, 1, 7])


def test_segments_are_counted_as_runs_are() -> None:
    table = [5, 6, 7, 3, 4, 9]
    assert churn.num_segments(table) == len(plan_runs(table, table)) == 3


def test_the_data_are_the_whole_traces() -> None:
    folder = ROOT / "benchmarks" / "data"
    traces = {name: churn.read_lengths(folder / file) for name, file in churn.TRACES.items()}
    assert {name: len(trace) for name, trace in traces.items()} == {"mooncake": 12031, "azure code": 8819}
    assert max(request.num_prompt_tokens for request in traces["mooncake"]) == 126_195
    assert sum(request.num_prompt_blocks > 7200 for request in traces["mooncake"]) == 37


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv.gz"
    path.write_bytes(gzip.compress(b"prompt,output\n3,many\n"))
    with pytest.raises(BenchmarkError, match="lengths"):
        churn.read_lengths(path)


def test_the_price_of_moves_is_in_saved_runs() -> None:
    def result(design: str, mean: float, num_moved: int) -> dict[str, object]:
        key = {"trace": "t", "num_blocks": 8, "order": "random", "design": design, "num_requests": 100}
        return {**key, "runs": {"mean": mean}, "num_blocks_moved": {"prefill": 0, "decode": num_moved}}

    results = [result("segments", 1.5, 0), result("segments, moves", 1.25, 50)]
    churn.add_move_prices(results, copy_us=100.0)
    assert results[1]["blocks_moved_per_run_saved"] == 2.0
    assert results[1]["break_even_call_us"] == 200.0
    assert "break_even_call_us" not in results[0]


def test_tenths_are_means_in_order() -> None:
    assert churn.tenths(list(range(20))) == [i * 2 + 0.5 for i in range(10)]
