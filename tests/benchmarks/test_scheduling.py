"""What the scheduling benchmarks compute of their runs, and a tiny run of each."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.scheduling import (
    __main__,
    cases,
    configurations,
    heterogeneous,
    loads,
    longbench,
    placement,
    real,
    shift,
    speed,
    summary,
    traces,
)
from benchmarks.scheduling.cases import Case, Row, Run
from benchmarks.scheduling.configurations import ADMISSION, FLEXIBLE, MIXED, MIXED_ADMISSION, STOCK
from flowkv.config import load_config, prefill_budget
from flowkv.sim.costs import PROFILE_FORMAT, Curve, Fit, LinkSpeeds, Profile, StepShape, cost_model
from flowkv.sim.figures import Record, Slo, figures
from flowkv.sim.run import simulate
from flowkv.types import Role

COST = "llama-3.1-8b/h100"
SLO = Slo(2.0, 0.025)


class InProcess(Run):
    """Runs cases where it is: a worker process takes a second to start."""

    def rows(self, title: str, cases: Sequence[Case]) -> list[Row]:
        return [run_case(case) for case in cases]


run_case = cases.run_case


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return InProcess(Console(width=200), quick=True, seeds=2, scratch=tmp_path)


# --- what runs say together ----------------------------------------------------------------------------------------


def _record(arrival_s: float, ttft_s: float | None, error: str | None = None) -> Record:
    return Record(0, arrival_s, 10, 2, ttft_s=ttft_s, e2el_s=ttft_s, error=error)


def test_phases_count_by_arrival() -> None:
    records = [_record(0.0, 1.0), _record(9.9, 3.0), _record(10.0, 1.0), _record(35.0, None, "failed")]
    assert cases.phases(records, 10.0, Slo(2.0)) == [(1, 2), (1, 1), (0, 1)]


def test_figures_are_cut_and_what_is_not_finite_is_none() -> None:
    assert cases.significant({"a": 1.23456789, "b": [math.inf, 2], "c": (0.000123456789,)}) == {
        "a": 1.2346, "b": [None, 2], "c": [0.00012346],
    }  # fmt: skip


def _row(name: str, good: float, seed: int = 0, **more: Any) -> Row:
    spread = {"mean": 0.01, "p50": 0.01, "p99": 0.02}
    return {
        "configuration": name, "seed": seed, "good_fraction": good, "goodput_per_s": 10 * good, "num_flips": 0,
        "phases": [good, good], "ttft_s": spread, "itl_s": spread, "tpot_s": spread, "e2el_s": spread, **more,
    }  # fmt: skip


def test_the_best_is_by_mean_over_seeds_and_the_first_of_equals() -> None:
    rows = [_row("a", 0.9), _row("a", 0.5, 1), _row("b", 0.8), _row("c", 0.8)]
    assert summary.best(rows, "abc", summary.good) == "b"
    assert summary.best(rows, "abc", summary.good, is_least=True) == "a"
    assert summary.best(rows, "ac", summary.good) == "c"
    assert summary.over_seeds(rows[:2], summary.good) == (0.7, 0.5, 0.9)


def test_a_point_of_a_run_without_tokens_is_infinite() -> None:
    assert summary.point("itl_s", "p99")(_row("a", 0.0) | {"itl_s": None}) == math.inf
    assert summary.ms(math.inf) == summary.ms(None) == "-"


def _shift_rows(scale: float, good: dict[str, float]) -> list[Row]:
    """Of all configurations; 0.1 where nothing else is said."""
    given = dict.fromkeys((*shift.SPLITS, STOCK, ADMISSION, MIXED_ADMISSION), 0.1) | good
    rows = [_row(name, value, scale=scale) for name, value in given.items()]
    return rows + [_row(name, given[name], 1, scale=scale) for name in (FLEXIBLE, MIXED)]


def test_flexible_is_compared_with_the_best_split_and_with_mixed_at_each_scale() -> None:
    rows = _shift_rows(0.2, {FLEXIBLE: 1.0, MIXED: 0.9, "5P3D": 0.99}) + _shift_rows(
        0.4, {FLEXIBLE: 0.98, MIXED: 0.985}
    )
    scales = shift.summarize(rows)
    assert [row["best_other"] for row in scales] == ["5P3D", MIXED]
    assert [round(row["ahead"], 3) for row in scales] == [0.01, -0.005]
    found = shift.judge(scales)
    assert found["is_never_behind"] and found["knee"] == 0.4 and found["is_knee_met"]


def test_a_rate_at_which_flexible_is_behind_and_a_split_that_does_too_well_are_misses() -> None:
    rows = _shift_rows(0.2, {FLEXIBLE: 0.985, MIXED: 0.999, "7P1D": 0.85}) + _shift_rows(
        0.4, {FLEXIBLE: 0.9, MIXED: 0.9}
    )
    found = shift.judge(shift.summarize(rows))
    assert not found["is_never_behind"] and found["behind_at"] == [0.2]
    assert found["knee"] == 0.2 and not found["is_knee_met"]


def test_without_a_knee_nothing_is_met() -> None:
    found = shift.judge(shift.summarize(_shift_rows(0.4, {FLEXIBLE: 0.5, MIXED: 0.4})))
    assert found["knee"] is None and not found["is_knee_met"]


def test_a_trace_is_judged_by_goodput_beside_the_best_other_and_by_its_itl() -> None:
    key: Row = {"setting": "code", "speedup": 2, "itl_bound_s": 0.025}
    rows = [_row(name, 0.9, **key) for name in (*traces.SPLITS, MIXED)] + [_row(STOCK, 1.0, **key)]
    late: Row = {"itl_s": {"mean": 0.02, "p50": 0.02, "p99": 0.03}}
    found = traces.judge([*rows, _row(FLEXIBLE, 0.97, **key, **late)])
    assert found["best_other"] == STOCK and not found["is_met"] and not found["is_itl_kept"]
    found = traces.judge([*rows, _row(FLEXIBLE, 0.99, **key)])
    assert found["is_met"] and found["is_itl_kept"]


def _e2el(name: str, seconds: float, **key: Any) -> Row:
    return _row(name, 1.0, **key) | {"e2el_s": {"mean": seconds, "p50": seconds, "p99": seconds}}


def test_gains_are_over_the_best_aggregated_server() -> None:
    key: Row = {"hardware": "8 A100", "dataset": "qmsum", "share": 0.5, "rate": 2.0}
    times_s = {
        longbench.FIXED: 9.0, FLEXIBLE: 6.0, longbench.FLEXIBLE_BOUND: 7.0, MIXED: 10.0, longbench.MIXED_BOUND: 8.0,
        STOCK: 12.0,
    }  # fmt: skip
    found = longbench.gains([_e2el(name, time_s, **key) for name, time_s in times_s.items()])
    assert found["ours"] == FLEXIBLE and found["best_aggregated"] == longbench.MIXED_BOUND
    assert found["less_than_best"] == pytest.approx(0.25) and found["less_than"][STOCK] == pytest.approx(0.5)


def test_where_prompts_went_is_told_by_the_number_of_an_instance() -> None:
    row = {"prefill_fraction": {"prefill-0": 1.0, "prefill-3": 0.5, "decode-4": 0.5, "decode-7": 0.0}}
    assert heterogeneous.prefill_on_l20(row, heterogeneous.L20 + heterogeneous.H20) == 0.75
    assert heterogeneous.prefill_on_l20(row, heterogeneous.H20 + heterogeneous.L20) == 0.25
    assert heterogeneous.prefill_on_l20({"prefill_fraction": {"mixed-0": 0.0}}, heterogeneous.L20) == 0.5


def test_real_and_simulated_agree_where_the_rounds_are_apart() -> None:
    def rounds(*times_s: float) -> list[Row]:
        return [_e2el("any", time_s) for time_s in times_s]

    real_rows = {"a": rounds(1.0, 1.2), "b": rounds(1.1, 1.3), "c": rounds(2.0, 2.1), "once": rounds(9.0)}
    simulated = {"a": rounds(1.0), "b": rounds(3.0), "c": rounds(2.0), "once": rounds(9.0)}

    def agrees(first: str, second: str) -> bool | None:
        found: bool | None = real.compare(real_rows, simulated, first, second)["E2E mean"]["agrees"]
        return found

    assert agrees("a", "c") is True and agrees("c", "a") is True
    assert agrees("b", "c") is False and agrees("c", "b") is False
    assert agrees("a", "b") is None and agrees("a", "once") is None


# --- what runs are made of -----------------------------------------------------------------------------------------


def test_whole_traces_are_there() -> None:
    found = {name: loads.read(path) for name, path in loads.TRACES.items()}
    assert {name: len(requests) for name, requests in found.items()} == {"conversation": 12_031, "code": 8_819}
    assert found["conversation"][-1].arrival_s == pytest.approx(3536.999)
    fast = loads.Trace("conversation", 8.0, 100).requests()
    assert len(fast) == 100 and fast[-1].arrival_s == found["conversation"][99].arrival_s / 8


def test_a_full_rate_is_what_one_chunk_after_another_and_full_decodes_allow() -> None:
    cost = cost_model(COST)
    chunks_s = cost.step_s(StepShape(2048, 2048 * 2049 // 2, 0, 0, 0))
    chunks_s += cost.step_s(StepShape(952, 952 * 2048 + 952 * 953 // 2, 0, 0, 0))
    step_s = cost.step_s(StepShape(0, 0, 16, 16 * 3050, 16))
    assert loads.full_rate([cost, cost], 3000, 100) == pytest.approx(2 / (chunks_s + 100 * step_s / 16))


@pytest.mark.parametrize(
    ("make", "roles"),
    [
        (lambda base: configurations.fixed(base, 6), [Role.PREFILL] * 6 + [Role.DECODE] * 2),
        (configurations.flexible, [Role.PREFILL] * 4 + [Role.DECODE] * 4),
        (configurations.mixed, [Role.MIXED] * 8),
        (configurations.stock, [Role.MIXED] * 8),
    ],
)
def test_every_configuration_is_one_and_has_eight_instances(
    make: Callable[[dict[str, Any]], dict[str, Any]], roles: list[Role]
) -> None:
    config = load_config(None, make(configurations.base(COST, 2.0, 0.025)))
    assert config.roles == roles
    assert (config.slo.tpot_s is None) == (make is configurations.stock)
    engine = config.engine
    assert prefill_budget(engine.max_batch_tokens, engine.block_size, Role.MIXED, 1) == (
        2048 if make is configurations.stock else 1024
    )


def test_arguments_of_a_real_server() -> None:
    assert real.arguments(real.CLUSTERS["mixed 2"]) == [
        "--prefill", "0", "--decode", "0", "--mixed", "2", "--set", "scheduling.roles=fixed",
    ]  # fmt: skip


def test_placements_are_timed_over_a_fleet_that_works() -> None:
    fleet = placement.filled(8, random.Random(0))
    assert all(view.is_available and view.cost.num_samples for view in fleet.views.values())
    found = placement.measure(8, 20)
    assert 0 < found["place_us"]["p50"] < found["whole_us"]["p50"]


def test_steps_at_a_stretch_change_no_record_and_no_figure() -> None:
    config = load_config(None, configurations.flexible(configurations.base(COST, 2.0, 0.025)))
    requests = [*loads.Trace("conversation", 4.0, 30).requests()]
    single, coalesced = (simulate(config, requests, coalesce=coalesce) for coalesce in (False, True))
    assert single.records == coalesced.records
    assert figures(single, SLO) == figures(coalesced, SLO)
    assert coalesced.num_events < single.num_events


# --- a tiny run of each --------------------------------------------------------------------------------------------


def test_worker_processes_give_what_this_one_gives_in_order() -> None:
    over = configurations.mixed(configurations.base(COST, 2.0, 0.025))
    given = [Case(MIXED, over, loads.Trace("code", 8.0, n), SLO, key={"n": n}, weight=n) for n in (3, 5)]
    rows = Run(Console(), processes=2).rows("test", given)
    assert [row["n"] for row in rows] == [3, 5]
    assert [_untimed(row) for row in rows] == [_untimed(cases.run_case(case)) for case in given]


def _untimed(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "wall_s"}


@pytest.mark.parametrize("part", [shift, traces, longbench, heterogeneous, speed, real], ids=lambda part: part.NAME)
def test_a_part_measures_prints_and_draws(
    part: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _shrink(run, monkeypatch)
    run.console = Console(width=200)
    __main__.measure(part, run, tmp_path)
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / f"sched-{part.NAME}.json").read_text())
    assert written["quick"] is True and "commit" in written["environment"]
    picture = tmp_path / f"sched-{part.NAME}.png"
    with Image.open(picture) as image:
        assert image.width > 400
    assert picture.stat().st_size < 150_000
    __main__.present(part, run.console, tmp_path)
    assert capsys.readouterr().out == printed


def _shrink(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part to the least that has all of its branches."""
    for name, value in (("QUICK_SCALES", (0.2,)), ("QUICK_SHIFT_S", 1.0), ("QUICK_WHOLE_S", 2.0)):
        monkeypatch.setattr(shift, name, value)
    monkeypatch.setattr(traces, "QUICK_REQUESTS", 3)
    monkeypatch.setattr(traces, "QUICK_SPEEDUPS", (8,))
    for part in (longbench, heterogeneous):
        monkeypatch.setattr(part, "QUICK_S", 1.0)
        monkeypatch.setattr(part, "DATASETS", ("multi_news",))
    monkeypatch.setattr(real, "QUICK_TURN_S", 0.2)
    monkeypatch.setattr(speed, "alone", lambda call, *arguments: call(*arguments))
    monkeypatch.setattr(speed, "FLEET_SIZES", (2,))
    monkeypatch.setattr(speed, "runs", lambda quick, large_requests: _timed_runs())
    run.profile = run.scratch / "profile.json"
    run.profile.write_bytes(msgspec.json.encode(_profile()))
    monkeypatch.setattr(real, "serve_all", lambda run, requests, rounds: _served(run, requests))


def _timed_runs() -> tuple[list[speed.Timed], speed.Timed, speed.Timed]:
    load = loads.Trace("code", 8.0, 4)
    pair = [speed.Timed("step by step", 8, load, coalesce=False), speed.Timed("coalesced", 8, load)]
    return pair, speed.Timed("20 requests", 16, loads.Repeated("code", 20, 8.0)), speed.Timed("profiled", 8, load)


def _served(run: Run, requests: list[Any]) -> dict[str, list[Row]]:
    assert run.profile is not None
    return {name: real.simulated_rows(run.profile, over, requests, 2) for name, over in real.CLUSTERS.items()}


def _profile() -> Profile:
    curve = Curve([0, 1, 512], [0.0, 0.001, 0.1])
    fit = Fit(step_s=0.002, prefill=curve, pair_s=1e-9, decode=curve, slot_s=1e-8, row_s=1e-5)
    links = LinkSpeeds(link_bytes_per_s=1e10, call_s=1e-5, message_s=1e-4)
    return Profile(
        format=PROFILE_FORMAT, model="tiny", dtype="float32", hardware="a machine", max_model_tokens=2048,
        vocab_size=1000, token_bytes=1000, kv_bytes=100_000_000, noise_fraction=0.01, fit=fit, links=links,
    )  # fmt: skip


def test_nothing_can_be_drawn_of_what_was_not_measured(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"sched-shift\.json"):
        __main__.present(shift, Console(), tmp_path)


def test_options() -> None:
    args = __main__.parse_arguments(["shift", "--quick", "--seeds", "3"])
    assert args.part == "shift" and args.quick and args.seeds == 3 and args.processes >= 1
    with pytest.raises(SystemExit):
        __main__.parse_arguments(["shift", "--seeds", "0"])
