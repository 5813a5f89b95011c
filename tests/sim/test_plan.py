"""The search of `flowkv plan` over made-up outcomes, and what is said of them."""

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv import cli
from flowkv.config import POLICIES, ClusterConfig, load_config, with_overrides
from flowkv.errors import ConfigError, SimulationError
from flowkv.sim import run
from flowkv.sim.candidates import (
    FIXED,
    FLEXIBLE,
    KINDS,
    MIXED,
    Candidate,
    Group,
    candidates,
    parse_groups,
    serve_commands,
)
from flowkv.sim.figures import SimResult
from flowkv.sim.plan import MAX_SPEEDUP, Job, Outcome, Row, capacities, compare, fewest, short_runs
from flowkv.sim.plan_report import table, verdict_of_fewest, verdict_of_load, verdict_of_rates
from flowkv.sim.plan_runs import Simulator, simulations
from flowkv.sim.workload import TraceRequest
from flowkv.types import Role
from tests.sim.results import result

EIGHT = candidates([Group("llama-3.1-8b/h100", 8)], [POLICIES[0]])


def outcome(good: float, latency_s: float | None = 1.0) -> Outcome:
    return Outcome(100, good, good * 2, latency_s, latency_s, 0.01, latency_s, 0.0)


@dataclass
class Evaluated:
    """Stands for the simulations: remembers them."""

    outcome_of: Callable[[Job], Outcome]
    jobs: list[Job] = field(default_factory=list)

    def __call__(self, jobs: Sequence[Job], purpose: str) -> list[Outcome]:
        self.jobs += jobs
        return [self.outcome_of(job) for job in jobs]


def named(name: str, of: Iterable[Candidate] = EIGHT) -> Candidate:
    return next(candidate for candidate in of if candidate.name == name)


def row(name: str, good: float, latency_s: float | None = 1.0, speedup: float = 1.0) -> Row:
    return Row(named(name), outcome(good, latency_s), good, speedup=speedup)


# --- candidates ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=2))
def test_a_candidate_has_every_instance_once_and_on_its_hardware(counts: list[int]) -> None:
    groups = [Group(f"llama-3.1-8b/{name}", count) for name, count in zip(("l20", "h20"), counts, strict=False)]
    found = candidates(groups, POLICIES)
    assert len({candidate.name for candidate in found}) == len(found)
    for candidate in found:
        config = with_overrides(ClusterConfig(), candidate.overrides)
        cost = config.simulate.cost
        costs = [cost] * len(config.roles) if isinstance(cost, str) else cost
        assert sorted(costs) == sorted(group.cost for group in groups for _ in range(group.count))
        assert candidate.num_instances == len(config.roles)
        roles = set(config.roles)
        assert roles == ({Role.PREFILL, Role.DECODE} if candidate.is_split else {Role.MIXED})
        assert (config.scheduling.roles == "flexible") is (candidate.kind == FLEXIBLE)
    assert any(candidate.is_split for candidate in found) is (sum(counts) > 1)


def test_names_say_what_differs() -> None:
    names = [candidate.name for candidate in EIGHT]
    assert names[0] == "8 mixed"
    assert names[1:8] == [f"{n}P{8 - n}D" for n in range(1, 8)]
    assert names[8:] == ["flexible 1P7D", "flexible 4P4D", "flexible 7P1D"]
    two = candidates([Group("llama-3.1-8b/l20", 4), Group("/there/h20.json", 4)], ["least_loaded"])
    assert named("l20 4P0D + h20 0P4D (least_loaded)", two).overrides["simulate.cost"] == (
        ["llama-3.1-8b/l20"] * 4 + ["/there/h20.json"] * 4
    )


def test_hardware_with_counts() -> None:
    assert parse_groups(["llama-3.1-8b/h100"], 8) == [Group("llama-3.1-8b/h100", 8)]
    both = [Group("llama-3.1-8b/l20", 4), Group("llama-3.1-8b/h20", 2)]
    assert parse_groups(["llama-3.1-8b/l20:4,h20:2"], None) == both
    assert parse_groups(["llama-3.1-8b/l20:4", "llama-3.1-8b/h20:2"], 6) == both


@pytest.mark.parametrize(
    ("texts", "num_instances", "words"),
    [
        (["llama-3.1-8b/l20"], None, "there are no instances"),
        ([""], 4, "there are no instances"),
        (["llama-3.1-8b/l20:0"], None, "there are no instances"),
        (["llama-3.1-8b/l20:4,h20"], 8, "there are no instances"),
        (["llama-3.1-8b/l20:4,h20:4"], 9, "--instances says 9, and the counts of --cost add up to 8"),
    ],
)
def test_hardware_that_does_not_add_up(texts: list[str], num_instances: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_groups(texts, num_instances)


@pytest.mark.parametrize("candidate", candidates([Group("llama-3.1-8b/h100", 3)], POLICIES), ids=lambda c: c.name)
def test_the_command_starts_the_candidate(candidate: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [
        "slo.ttft_s=2.0",
        "slo.tpot_s=0.025",
        "slo.admission=true",
        "engine.max_batch_tokens=2048",
        "engine.kv_memory=4GiB",
        "scheduling.dwell_s=1.5",
        "transfer.lease_s=7.5",
        "model=/a folder/model",
    ]
    config = load_config(None, candidate.overrides, settings)
    (command,) = serve_commands(candidate, config)
    started: list[ClusterConfig] = []
    monkeypatch.setattr("flowkv.launch.serve.serve", lambda config, display: started.append(config))
    assert cli.main(shlex.split(command)[1:]) == 0
    assert started == [with_overrides(config, {"simulate.cost": ClusterConfig().simulate.cost})]


def test_other_hardware_joins() -> None:
    groups = [Group("llama-3.1-8b/l20", 4), Group("llama-3.1-8b/h20", 4)]
    split = named("l20 4P0D + h20 1P3D", candidates(groups, [POLICIES[0]]))
    assert serve_commands(split, with_overrides(ClusterConfig(), split.overrides)) == [
        "flowkv serve MODEL --prefill 4 --decode 0 --roles fixed --listen ADDRESS  # on l20",
        "flowkv join ADDRESS MODEL --role prefill --count 1  # on h20",
        "flowkv join ADDRESS MODEL --role decode --count 3  # on h20",
    ]


# --- one load ------------------------------------------------------------------------------------------------------


@given(st.permutations(range(len(EIGHT))), st.integers(0, 5000))
def test_the_best_is_found_and_the_best_of_each_kind_sees_the_whole_workload(order: list[int], num: int) -> None:
    good = {candidate: 1 - 0.05 * place for candidate, place in zip(EIGHT, order, strict=True)}
    evaluated = Evaluated(lambda job: outcome(good[job.candidate]))
    rows = compare(EIGHT, short_runs(len(EIGHT), num), [0, 1], evaluated)
    assert {row.candidate for row in rows} == set(EIGHT) and len(rows) == len(EIGHT)
    assert rows[0].candidate == max(EIGHT, key=good.__getitem__)
    whole = {job.candidate for job in evaluated.jobs if job.share == 1.0}
    assert whole == {row.candidate for row in rows if not row.is_dropped}
    assert whole >= {max((c for c in EIGHT if c.kind == kind), key=good.__getitem__) for kind in KINDS}
    assert all(job.seed == 0 for job in evaluated.jobs if job.share < 1.0)
    assert (len(whole) == len(EIGHT)) is (num < 600)  # a third is the longest part that is tried before the whole


def test_most_are_dropped_early() -> None:
    evaluated = Evaluated(lambda job: outcome(1 - 0.05 * EIGHT.index(job.candidate)))
    rows = compare(EIGHT, short_runs(len(EIGHT), 10_000), [0], evaluated)
    assert sum(job.share for job in evaluated.jobs) < 0.8 * len(EIGHT)
    assert [row.is_dropped for row in rows] == sorted(row.is_dropped for row in rows)
    assert [row.share for row in rows] == sorted((row.share for row in rows), reverse=True)


def test_few_candidates_or_few_requests_all_see_the_whole_workload() -> None:
    assert short_runs(3, 10_000) == short_runs(11, 599) == []
    assert short_runs(11, 600) == [1 / 3]


def test_what_is_not_clearly_worse_stays() -> None:
    evaluated = Evaluated(lambda job: outcome(0.99 - 0.001 * EIGHT.index(job.candidate)))
    assert not any(row.is_dropped for row in compare(EIGHT, short_runs(len(EIGHT), 10_000), [0], evaluated))


def test_latency_decides_between_equals() -> None:
    latency_s = {candidate: 2.0 - 0.01 * i for i, candidate in enumerate(EIGHT)}
    evaluated = Evaluated(lambda job: outcome(0.9901 if job.candidate is EIGHT[0] else 0.99, latency_s[job.candidate]))
    assert compare(EIGHT, [], [0], evaluated)[0].candidate == EIGHT[-1]


def test_what_answers_nothing_is_last() -> None:
    evaluated = Evaluated(lambda job: outcome(0.0, None if job.candidate is EIGHT[0] else 9.0))
    assert compare(EIGHT, [], [0], evaluated)[-1].candidate == EIGHT[0]


def test_rows_are_means_over_seeds() -> None:
    rows = compare(EIGHT[:1], [], [0, 1], Evaluated(lambda job: outcome((0.5, 1.0)[job.seed], (1.0, 4.0)[job.seed])))
    assert (rows[0].outcome.good_fraction, rows[0].outcome.e2el_mean_s, rows[0].lowest_fraction) == (0.75, 2.5, 0.5)


# --- the highest rate ----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.05, 40.0), min_size=len(EIGHT), max_size=len(EIGHT)), st.sampled_from([[], [0.1, 0.3]]))
def test_capacities_are_found_to_two_percent(limits: list[float], shares: list[float]) -> None:
    limit = dict(zip(EIGHT, limits, strict=True))
    evaluated = Evaluated(lambda job: outcome(1.0 if job.speedup <= limit[job.candidate] else 0.5))
    rows = capacities(EIGHT, shares, [0, 1], 0.99, evaluated)
    for row in rows:
        assert row.outcome.good_fraction == 1.0
        assert row.speedup <= limit[row.candidate] < row.speedup * (1.25 if row.is_dropped else 1.02) * 1.0001
    assert rows[0].speedup * 1.0201 >= max(limits)
    assert {row.candidate.kind for row in rows if not row.is_dropped} == set(KINDS)


def test_no_rate_and_any_rate() -> None:
    evaluated = Evaluated(lambda job: outcome(1.0 if job.candidate.kind == FIXED else 0.5))
    rows = capacities(EIGHT, [0.3], [0], 0.99, evaluated)
    assert {row.speedup for row in rows if row.candidate.kind == FIXED} == {MAX_SPEEDUP}
    assert {row.speedup for row in rows if row.candidate.kind != FIXED} == {0.0}
    assert len(evaluated.jobs) < 200


# --- the fewest instances ------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 120))
def test_the_fewest_that_are_enough(low: int, more: int, least: int) -> None:
    asked: list[int] = []
    found = fewest(low, low + more, lambda num: asked.append(num) or num >= least)  # type: ignore[func-returns-value]
    assert found == (max(low, least) if least <= low + more else None)
    assert len(asked) <= 2 + math.log2(more + 1)


# --- verdicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "has_slo", "pays", "text"),
    [
        (
            [row("flexible 4P4D", 0.994), row("8 mixed", 0.98), row("4P4D", 0.653)], True, True,
            "Splitting pays: flexible 4P4D keeps 99.4% within the SLO where 8 mixed keep 98.0%; a fixed split would not"
            " (4P4D keeps 65.3%).",
        ),
        (
            [row("flexible 4P4D", 0.999), row("4P4D", 0.995), row("8 mixed", 0.9)], True, True,
            "Splitting pays: flexible 4P4D keeps 99.9% within the SLO where 8 mixed keep 90.0%; so does a fixed split"
            " (4P4D keeps 99.5%).",
        ),
        (
            [row("8 mixed", 0.97), row("4P4D", 0.5)], True, False,
            "Splitting does not pay here: 8 mixed keep 97.0% within the SLO where the best split, 4P4D keeps 50.0%."
            " Nothing keeps the target of 99.0%.",
        ),
        (
            [row("4P4D", 1.0, 1.0), row("8 mixed", 0.999, 1.04)], True, None,
            "Splitting makes no difference here: 8 mixed keep 99.9% within the SLO and answer in 1.04 s on average, and"
            " the best split, 4P4D keeps 100.0% and answers in 1 s on average.",
        ),
        (
            [row("4P4D", 1.0, 1.0), row("8 mixed", 1.0, 1.5)], False, True,
            "Splitting pays: 4P4D answers in 1 s on average where 8 mixed answer in 1.5 s on average.",
        ),
        ([row("8 mixed", 0.0, None)], False, None, "A single instance cannot be split: it answers nothing."),
    ],
)  # fmt: skip
def test_the_verdict_of_a_load(rows: list[Row], has_slo: bool, pays: bool | None, text: str) -> None:
    found = verdict_of_load(rows, has_slo, 0.99)
    assert (found.text, found.pays) == (text, pays)
    assert found.winner.candidate.is_split is (pays is True)


def test_what_was_dropped_early_has_no_say() -> None:
    early = replace(row("4P4D", 1.0), is_dropped=True)
    assert verdict_of_load([early, row("8 mixed", 0.9), row("flexible 4P4D", 0.5)], True, 0.5).pays is False


@pytest.mark.parametrize(
    ("rows", "pays", "text"),
    [
        (
            [row("flexible 4P4D", 1, speedup=3), row("8 mixed", 1, speedup=2), row("4P4D", 1, speedup=2)], True,
            "Splitting pays: flexible 4P4D takes 24 requests/s (3 an instance) with 99.0% within the SLO, 1.5 times the"
            " 16 of 8 mixed; a fixed split would not (4P4D: 16).",
        ),
        (
            [row("4P4D", 1, speedup=MAX_SPEEDUP), row("8 mixed", 0.5, speedup=0)], True,
            "Splitting pays: 4P4D takes at least 512 requests/s (64 an instance) with 99.0% within the SLO, which"
            " 8 mixed keep at no rate.",
        ),
        (
            [row("8 mixed", 1, speedup=2), row("4P4D", 0.5, speedup=1)], False,
            "Splitting does not pay here: 8 mixed take 16 requests/s (2 an instance) with 99.0% within the SLO, 2 times"
            " the 8 of 4P4D.",
        ),
        (
            [row("4P4D", 1, speedup=1.01), row("8 mixed", 1, speedup=1)], None,
            "Splitting makes no difference here: 8 mixed take 8 requests/s (1 an instance) with 99.0% within the SLO,"
            " 0.99 times the 8.08 of 4P4D.",
        ),
        (
            [row("8 mixed", 0.5, speedup=0), row("4P4D", 0.5, speedup=0)], None,
            "Nothing keeps 99.0% within the SLO, however slowly requests come.",
        ),
    ],
)  # fmt: skip
def test_the_verdict_of_rates(rows: list[Row], pays: bool | None, text: str) -> None:
    found = verdict_of_rates(rows, 8.0, 0.99)
    assert (found.text, found.pays) == (text, pays)


def test_the_verdict_of_the_fewest() -> None:
    compared = {8: [row("4P4D", 0.995), row("8 mixed", 0.992)]}
    assert verdict_of_fewest(compared, None, 8, 0.99).text == (
        "Splitting pays: 8 instances (4P4D) keep 99.5% within the SLO; no number of mixed ones does."
    )
    assert verdict_of_fewest(compared, 8, 12, 0.99).text == (
        "Splitting does not pay here: 8 instances (8 mixed) keep 99.2% within the SLO; split it takes 12."
    )
    assert verdict_of_fewest(compared, 8, 8, 0.99).text.startswith("8 instances are enough. Splitting makes no")
    assert verdict_of_fewest(compared, None, None, 0.999).text.startswith("8 instances are not enough. Splitting")


def test_the_table_says_what_was_simulated() -> None:
    early = replace(row("4P4D", 0.25, None), is_dropped=True, share=0.125)
    header, cells = table([row("8 mixed", 1.0), early], None, has_slo=True)
    assert "worst seed" not in header
    told = dict(zip(header, cells[1], strict=True))
    assert (told["configuration"], told["in SLO"], told["TTFT p99 s"], told["simulated"]) == (
        "4P4D", "25.0%", "-", "12.5%",
    )  # fmt: skip
    header, cells = table([row("8 mixed", 1.0, speedup=2.0)], 12.0, has_slo=False)
    assert header[:4] == ["configuration", "requests/s", "an instance", "answered"]
    assert cells[0][:3] == ["8 mixed", "24.00", "3.00"]
    header, cells = table([replace(row("8 mixed", 0.75), lowest_fraction=0.5)], None, has_slo=True)
    assert dict(zip(header, cells[0], strict=True))["worst seed"] == "50.0%"


# --- simulations ---------------------------------------------------------------------------------------------------


def simulator() -> Simulator:
    return Simulator(ClusterConfig(), {7: [TraceRequest(float(i), 10, 5) for i in range(10)]})


def test_a_job_is_a_part_of_the_workload_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[ClusterConfig, list[TraceRequest], int]] = []

    def simulate(config: ClusterConfig, requests: list[TraceRequest], *, seed: int) -> SimResult:
        calls.append((config, requests, seed))
        return result()

    monkeypatch.setattr(run, "simulate", simulate)
    found = simulator().run(Job(named("3P5D"), 7, 0.25, 2.0))
    ((config, requests, seed),) = calls
    assert [request.arrival_s for request in requests] == [0.0, 0.5, 1.0]
    assert (config.prefill, config.decode, seed) == (3, 5, 7)
    assert (found.good_fraction, found.num_flips, found.errors) == (0.75, 1, ("no room",))


def test_an_error_names_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def simulate(config: ClusterConfig, requests: list[TraceRequest], *, seed: int) -> SimResult:
        raise SimulationError("stuck")

    monkeypatch.setattr(run, "simulate", simulate)
    with pytest.raises(SimulationError, match="3P5D: stuck"):
        simulator().run(Job(named("3P5D"), 7, 1.0, 1.0))


def test_several_processes_give_what_one_gives() -> None:
    jobs = [Job(candidate, 7, 1.0, 1.0) for candidate in candidates([Group("llama-3.1-8b/h100", 2)], POLICIES)]
    outcomes = []
    for num_processes in (1, 2):
        shown: list[tuple[int, int]] = []
        with simulations(simulator(), num_processes, lambda *told: shown.append(told[2:])) as evaluate:  # noqa: B023
            outcomes.append(evaluate(jobs, ""))
        assert shown == [(i, len(jobs)) for i in range(len(jobs) + 1)]
    assert outcomes[0] == outcomes[1]
    assert {outcome.good_fraction for outcome in outcomes[0]} == {1.0}


def test_what_is_mixed_is_simpler_and_comes_first() -> None:
    assert [candidate.kind for candidate in EIGHT] == [MIXED] + [FIXED] * 7 + [FLEXIBLE] * 3
