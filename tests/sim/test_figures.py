import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.sim.figures import (
    Distribution,
    Record,
    RunResult,
    Slo,
    figures,
    percentile,
    server_figures,
    summarize,
    totals,
)
from flowkv.types import InstanceCounters

seconds = st.floats(1e-6, 1e5)


def record(ttft_s: float | None, e2el_s: float | None, tokens: int = 3, error: str | None = None) -> Record:
    return Record(0, 1.0, 10, tokens, ttft_s=ttft_s, e2el_s=e2el_s, error=error)


# --- one request ---------------------------------------------------------------------------------------------------


def test_tpot_is_what_follows_the_first_token() -> None:
    assert record(0.5, 0.9).tpot_s == pytest.approx(0.2)
    assert record(0.5, 0.5, tokens=1).tpot_s is None
    assert record(None, None).tpot_s is None


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), True),
        (Slo(ttft_s=0.5), True),
        (Slo(ttft_s=0.4), False),
        (Slo(tpot_s=0.25), True),
        (Slo(tpot_s=0.1), False),
        (Slo(ttft_s=0.5, tpot_s=0.1), False),
    ],
)
def test_slo(slo: Slo, good: bool) -> None:
    assert slo.holds(record(0.5, 0.9)) is good


def test_what_failed_or_said_nothing_is_never_good() -> None:
    assert not Slo().holds(record(0.5, 0.9, error="gone"))
    assert not Slo().holds(record(None, None))


# --- many values ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], fraction: float) -> None:
    assert percentile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)), abs=1e-6)


def test_no_values_have_no_percentile_and_no_summary() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match="no values"):
        Distribution().quantile(0.5)
    assert summarize([]) is None
    assert summarize(Distribution()) is None
    assert Distribution().curve() == ([], [])


def test_summary() -> None:
    values = [float(value) for value in range(1, 102)]
    assert summarize(values) == {"mean": 51.0, "p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 101.0}


@given(st.lists(seconds, min_size=1, max_size=200), st.floats(0, 1))
def test_a_distribution_is_within_half_a_percent_of_the_value_of_that_rank(
    values: list[float], fraction: float
) -> None:
    counted = Distribution()
    counted.add(values)
    exact = sorted(values)[int(fraction * (len(values) - 1))]
    assert counted.quantile(fraction) == pytest.approx(exact, rel=0.005)


def test_ranks_count_from_the_lowest() -> None:
    counted = Distribution()
    counted.add([0.4, 0.1, 0.2])
    assert [counted.quantile(fraction) for fraction in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.2, 0.4], rel=0.005)


@given(st.lists(st.tuples(st.lists(seconds, max_size=5), st.integers(1, 9)), max_size=20), st.randoms())
def test_order_and_grouping_change_nothing(groups: list[tuple[list[float], int]], rng: random.Random) -> None:
    together, apart = Distribution(), Distribution()
    for values, weight in groups:
        together.add(values, weight)
    singles = [value for values, weight in groups for value in values * weight]
    rng.shuffle(singles)
    for value in singles:
        apart.add_one(value)
    assert together.summary() == apart.summary()
    assert together.curve() == apart.curve()
    assert together.count == len(singles)


def test_a_distribution_of_many_values_is_as_good_as_all_of_them() -> None:
    values = np.random.default_rng(1).lognormal(-4, 0.7, 100_000)
    counted, exact = Distribution(), summarize(values.tolist())
    counted.add(values)
    assert exact is not None
    assert counted.summary() == {
        "mean": pytest.approx(exact["mean"], rel=1e-6),
        **{name: pytest.approx(exact[name], rel=0.002) for name in ("p50", "p90", "p99")},
        "max": exact["max"],
    }


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e9])
def test_values_beyond_the_buckets_are_counted_at_the_ends(value: float) -> None:
    counted = Distribution()
    counted.add([value, value])
    counted.add_one(value)
    assert counted.count == 3
    assert counted.quantile(0.5) == value


def test_a_curve_climbs_to_one() -> None:
    counted = Distribution()
    counted.add([0.1, 0.2], weight=3)
    counted.add_one(0.4, weight=2)
    values, fractions = counted.curve()
    assert values == [pytest.approx(0.1, rel=0.005), pytest.approx(0.2, rel=0.005), pytest.approx(0.4, rel=0.005)]
    assert fractions == [3 / 8, 6 / 8, 1.0]


# --- one run -------------------------------------------------------------------------------------------------------


def run(records: Sequence[Record], itl_s: Sequence[float] = ()) -> RunResult:
    return RunResult(list(records), itl_s, 2.0)


def test_figures_of_a_run() -> None:
    refused = Record(3, 1.0, 10, 0, error="no room", is_refused=True)
    records = [record(0.5, 0.9), record(1.0, 1.1, tokens=2), record(0.1, None, error="gone"), refused]
    found = figures(run(records, [0.1, 0.3, 0.1]), Slo(ttft_s=0.6))
    assert (found["num_requests"], found["num_errors"], found["num_refused"]) == (4, 1, 1)
    assert (found["prompt_tokens_per_s"], found["output_tokens_per_s"], found["requests_per_s"]) == (10.0, 2.5, 1.0)
    assert (found["goodput_per_s"], found["good_fraction"]) == (0.5, 0.25)
    assert found["ttft_s"]["p50"] == pytest.approx(0.75)
    assert found["tpot_s"]["max"] == pytest.approx(0.2)
    assert found["e2el_s"]["mean"] == pytest.approx(1.0)
    assert found["itl_s"]["max"] == pytest.approx(0.3)


def test_a_run_in_which_nothing_was_answered() -> None:
    refused = Record(0, 0.0, 10, 0, error="no room", is_refused=True)
    found = figures(RunResult([refused], Distribution(), 0.0), Slo())
    assert (found["ttft_s"], found["itl_s"], found["goodput_per_s"]) == (None, None, 0.0)


def test_counters_of_instances_add_up_under_the_names_of_the_metrics() -> None:
    one = InstanceCounters(
        num_steps=4, step_seconds=2.0, forward_seconds=1.5, sampling_seconds=0.3,
        transfer_bytes=4000, transfer_seconds=0.5, transfer_exposed_seconds=0.1,
    )  # fmt: skip
    counted = totals([one, one])
    assert (counted["steps"], counted["transfer_bytes"]) == (8, 8000)
    derived = server_figures(counted)
    assert derived["transfer_bytes_per_s"] == 8000
    assert derived["transfer_hidden_fraction"] == pytest.approx(0.8)
    assert derived["step_overhead_fraction"] == pytest.approx(0.1)
    assert "step_overhead_fraction" not in server_figures(totals([InstanceCounters(step_seconds=1.0)]))
