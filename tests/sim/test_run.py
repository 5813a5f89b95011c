"""Whole workloads through the simulated cluster: nothing is lost, and nothing depends on how time is cut."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flowkv.cluster.controller import Controller
from flowkv.config import ClusterConfig, EngineConfig, SchedulingConfig, SimulateConfig, SloConfig
from flowkv.engine.engine import Engine
from flowkv.errors import ConfigError
from flowkv.messages import Message, Outputs, SetRole, Submit
from flowkv.sim.cluster import SimCluster
from flowkv.sim.costs import CostModel, StepShape, cost_model
from flowkv.sim.figures import Record, SimResult
from flowkv.sim.instance import Noise
from flowkv.sim.run import cost_models, simulate
from flowkv.sim.workload import TraceRequest
from flowkv.sim.world import CONTROLLER, FRONTEND
from flowkv.types import Request, Role, SamplingParams

SLOW = SimulateConfig(cost="llama-3.1-8b/l20", start_s=2.0)
OFTEN = SchedulingConfig(dwell_s=1.0, interval_s=0.25)
SLO = SloConfig(ttft_s=2.0, tpot_s=0.05)
FLEXIBLE = ClusterConfig(prefill=1, decode=3, slo=SLO, scheduling=OFTEN, simulate=SLOW)


def shifting(seed: int, count: int = 100, per_s: float = 4.0) -> list[TraceRequest]:
    """Long prompts and short answers, then the reverse, then again."""
    drawn, now_s, requests = random.Random(seed), 0.0, list[TraceRequest]()
    for i in range(count):
        now_s += drawn.expovariate(per_s)
        prompt, output = (5000, 30) if (4 * i // count) % 2 == 0 else (300, 250)
        spread = [drawn.lognormvariate(0, 0.3) for _ in range(2)]
        requests.append(TraceRequest(now_s, 1 + int(spread[0] * prompt), 1 + int(spread[1] * output)))
    return requests


def figures(result: SimResult) -> dict[str, Any]:
    """All that a run gives but for how many events it took."""
    return {
        "records": result.records, "itl": result.itl.summary(), "duration_s": result.duration_s,
        "samples": result.samples, "flips": result.flips, "counters": result.counters,
    }  # fmt: skip


def check_all_answered(result: SimResult, requests: Sequence[TraceRequest]) -> None:
    assert [record.error for record in result.records] == [None] * len(requests)
    for record, request in zip(result.records, requests, strict=True):
        assert record.num_output_tokens == request.num_output_tokens
        assert record.ttft_s is not None and record.e2el_s is not None
        assert 0 < record.ttft_s <= record.e2el_s


# --- the same whatever the cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_many_steps_at_once_change_nothing(seed: int) -> None:
    requests = shifting(seed)
    coalesced = simulate(FLEXIBLE, requests, seed=seed)
    single = simulate(FLEXIBLE, requests, seed=seed, coalesce=False)
    assert single.flips, "the load is there to flip roles"
    assert figures(coalesced) == figures(single)
    assert coalesced.num_events < single.num_events


@pytest.mark.parametrize("policy", ["predicted_latency", "least_loaded"])
def test_with_fixed_roles_and_no_slo_neither(policy: str) -> None:
    config = ClusterConfig(
        prefill=1, decode=2, scheduling=SchedulingConfig(roles="fixed", policy=policy), simulate=SLOW
    )  # fmt: skip
    requests = shifting(7, 60)
    assert figures(simulate(config, requests)) == figures(simulate(config, requests, coalesce=False))


def test_nor_where_memory_is_short() -> None:
    engine = EngineConfig(kv_memory="3GiB", max_choices=64)
    config = ClusterConfig(prefill=1, decode=1, engine=engine, scheduling=OFTEN, simulate=SLOW)
    requests = shifting(8, 60, per_s=6.0)
    coalesced, single = simulate(config, requests), simulate(config, requests, coalesce=False)
    assert figures(coalesced) == figures(single)
    check_all_answered(coalesced, requests)


def test_the_same_arguments_give_the_same_result_and_another_seed_another() -> None:
    requests = shifting(1, 60)
    first = simulate(FLEXIBLE, requests, seed=5)
    again = simulate(FLEXIBLE, requests, seed=5)
    assert figures(first) == figures(again) and first.num_events == again.num_events
    assert figures(simulate(FLEXIBLE, requests, seed=6)) != figures(first)


@given(st.lists(st.tuples(st.integers(1, 6000), st.floats(0, 1)), max_size=12), st.integers(0, 3))
def test_the_nth_step_has_the_nth_factor_however_steps_are_cut(cuts: list[tuple[int, float]], seed: int) -> None:
    whole, noise, used = Noise(0.1, (seed, 1)).take(80_000), Noise(0.1, (seed, 1)), 0
    for count, fraction in cuts:
        taken, kept = noise.take(count), int(fraction * count)
        assert taken == whole[used : used + count]
        noise.give_back(count - kept)
        used += kept


def test_noise_is_about_one_and_each_instance_has_its_own() -> None:
    one, other = Noise(0.1, (0, 1)).take(5000), Noise(0.1, (0, 2)).take(5000)
    assert one != other
    assert np.mean(one) == pytest.approx(1.0, abs=0.01) and np.std(one) == pytest.approx(0.1, rel=0.1)
    assert min(Noise(5.0, (0, 1)).take(1000)) > 0
    assert set(Noise(0.0, (0, 1)).take(10)) == {1.0}


# --- nothing is lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefill", "decode", "mixed"), [(1, 1, 0), (2, 1, 0), (0, 0, 2), (1, 1, 1), (0, 1, 0)])
@pytest.mark.parametrize("roles", ["flexible", "fixed"])
def test_every_request_ends_with_all_of_its_tokens(prefill: int, decode: int, mixed: int, roles: str) -> None:
    scheduling = SchedulingConfig(roles=roles, dwell_s=1.0, interval_s=0.25)
    config = ClusterConfig(
        prefill=prefill, decode=decode, mixed=mixed, slo=SLO, scheduling=scheduling, simulate=SLOW
    )  # fmt: skip
    requests = shifting(2, 40)
    result = simulate(config, requests)
    check_all_answered(result, requests)
    counters = result.counters.values()
    assert sum(c.prefill_tokens for c in counters) == sum(r.num_prompt_tokens for r in requests)
    assert sum(c.decode_tokens for c in counters) == sum(r.num_output_tokens - 1 for r in requests)
    assert result.itl.count == sum(r.num_output_tokens - 1 for r in requests)
    assert (roles == "fixed") <= (not result.flips)


def test_what_no_instance_could_hold_is_refused_and_the_rest_goes_on() -> None:
    engine = EngineConfig(kv_memory="1GiB")  # 8,192 tokens of this model
    config = ClusterConfig(prefill=1, decode=1, engine=engine, simulate=SLOW)
    requests = [TraceRequest(0.1 * i, 20_000 if i == 3 else 500, 20) for i in range(6)]
    result = simulate(config, requests)
    errors = [record.error for record in result.records]
    assert errors[:3] + errors[4:] == [None] * 5
    assert errors[3] is not None and "20000 tokens" in errors[3]
    assert result.records[3].num_output_tokens == 0 and not result.records[3].is_refused


def test_admission_refuses_at_once_what_would_be_late() -> None:
    slo = SloConfig(ttft_s=2.0, tpot_s=0.05, admission=True)
    config = ClusterConfig(prefill=1, decode=1, slo=slo, scheduling=OFTEN, simulate=SLOW)
    requests = [TraceRequest(0.1 * i, 4000, 20) for i in range(300)]
    result = simulate(config, requests)
    refused = [record for record in result.records if record.is_refused]
    answered = [record for record in result.records if record.error is None]
    assert refused and answered and len(refused) + len(answered) == len(requests)
    assert all(record.e2el_s is not None and record.e2el_s < 0.1 for record in refused)
    ttfts_s = [record.ttft_s for record in answered if record.ttft_s is not None and record.arrival_s > 10]
    assert len(ttfts_s) > 20 and np.quantile(ttfts_s, 0.9) < 2 * 2.0


def test_urgent_requests_pass_others() -> None:
    config = ClusterConfig(prefill=0, decode=0, mixed=1, simulate=SLOW)
    requests = [TraceRequest(0.05 * i, 4000, 5, priority=-(i % 2)) for i in range(40)]
    result = simulate(config, requests)
    check_all_answered(result, requests)

    def mean_ttft_s(records: list[Record]) -> float:
        return float(np.mean([record.ttft_s for record in records if record.ttft_s is not None]))

    assert mean_ttft_s(result.records[1::2]) < mean_ttft_s(result.records[::2])


def test_instances_come_and_go_with_the_load_and_nothing_is_lost() -> None:
    scheduling = replace_scheduling(min_instances=1, max_instances=3)
    config = ClusterConfig(prefill=0, decode=0, mixed=1, slo=SLO, scheduling=scheduling, simulate=SLOW)
    burst = [TraceRequest(0.15 * i, 3000, 60) for i in range(100)]
    calm = [TraceRequest(60 + 0.5 * i, 200, 60) for i in range(120)]
    result = simulate(config, burst + calm)
    check_all_answered(result, burst + calm)
    sizes = [len(sample.instances) for sample in result.samples]
    assert sizes[0] == 1 and max(sizes) == 3 and sizes[-1] < 3
    helpers = {record.prefill_instance for record in result.records}
    assert len(helpers) == 3


def test_phases_come_and_go_too() -> None:
    scheduling = replace_scheduling(min_instances=2, max_instances=5)
    config = ClusterConfig(prefill=1, decode=1, slo=SLO, scheduling=scheduling, simulate=SLOW)
    requests = shifting(3, 80, per_s=4.0) + [TraceRequest(90 + 0.5 * i, 200, 60) for i in range(80)]
    result = simulate(config, requests)
    check_all_answered(result, requests)
    sizes = [len(sample.instances) for sample in result.samples]
    assert max(sizes) > 2 and min(sizes) == 2 and sizes[-1] < max(sizes)
    assert figures(result) == figures(simulate(config, requests, coalesce=False))


def replace_scheduling(min_instances: int, max_instances: int) -> SchedulingConfig:
    return SchedulingConfig(dwell_s=1.0, interval_s=0.25, min_instances=min_instances, max_instances=max_instances)


# --- what the decisions know ---------------------------------------------------------------------------------------


class _Guarded:
    """A cost model that may be asked only while nobody decides anything."""

    num_deciding = 0

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.num_asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cost, name)

    def step_s(self, shape: StepShape) -> float:
        return self._asked(self._cost.step_s(shape))

    def repeated_s(self, decode_choices: int, decode_context_tokens: int, num_steps: int) -> NDArray[np.float64]:
        self._asked(0.0)
        return self._cost.repeated_s(decode_choices, decode_context_tokens, num_steps)

    def _asked(self, seconds: float) -> float:
        assert _Guarded.num_deciding == 0, "a decision has looked at the simulator's costs"
        self.num_asked += 1
        return seconds


def deciding(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _Guarded.num_deciding += 1
        try:
            return method(*args, **kwargs)
        finally:
            _Guarded.num_deciding -= 1

    return wrapper


def test_neither_controller_nor_engines_ever_ask_what_a_step_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, names in (
        (Controller, ("__init__", "handle", "tick")),
        (Engine, ("__init__", "handle", "tick", "next_batch", "on_result", "on_written", "on_arrived")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, deciding(getattr(owner, name)))
    guarded = [_Guarded(cost) for cost in cost_models(FLEXIBLE)]
    requests = shifting(4, 40)
    result = simulate(FLEXIBLE, requests, costs=guarded)
    assert all(cost.num_asked for cost in guarded)
    assert figures(result) == figures(simulate(FLEXIBLE, requests))


def test_faster_hardware_is_found_without_being_named() -> None:
    """One of two equal names computes five times as fast; the controller can only learn it."""
    costs = [cost_model("llama-3.1-8b/l20"), cost_model("llama-3.1-8b/h100")]
    config = ClusterConfig(prefill=0, decode=0, mixed=2, simulate=SLOW)
    requests = [TraceRequest(0.2 * i, 2000, 50) for i in range(150)]
    result = simulate(config, requests, costs=costs)
    served = [record.prefill_instance for record in result.records[30:]]
    assert served.count("mixed-1") > 2 * served.count("mixed-0")


def test_cost_models_must_fit_the_cluster() -> None:
    two = replace_costs(["llama-3.1-8b/l20", "llama-3.1-8b/h20"])
    assert [model.hardware for model in cost_models(two)] == ["l20", "h20"]
    with pytest.raises(ConfigError, match="3 cost models for 2 instances"):
        cost_models(replace_costs(["llama-3.1-8b/l20"] * 3))
    with pytest.raises(ConfigError, match="a cluster serves one"):
        cost_models(replace_costs(["llama-3.1-8b/l20", "llama-3.1-70b/h100x4"]))


def replace_costs(names: list[str]) -> ClusterConfig:
    return ClusterConfig(prefill=1, decode=1, simulate=SimulateConfig(cost=names))


# --- decodes under endless prefills --------------------------------------------------------------------------------


class Stream:
    """The clients of one simulated instance: one long answer, and prompts without end."""

    def __init__(self, slo: SloConfig) -> None:
        config = ClusterConfig(prefill=0, decode=1, slo=slo, simulate=SLOW)
        self.cost = cost_model("llama-3.1-8b/l20")
        self.cluster = SimCluster(config, [self.cost], 0, True, self.hear, self.put_out)
        self.times_s: list[float] = []  # of the tokens of the long answer
        self.num_prompts = 0
        self.num_answered = 0

    def hear(self, message: Message) -> None:
        pass

    def put_out(self, outputs: Outputs, times_s: Sequence[float]) -> None:
        for output in outputs.outputs:
            if output.request_id == "long":
                self.times_s += times_s[-len(output.token_ids) :]
            else:
                self.num_answered += output.finish_reason is not None

    def submit(self, request_id: str, prompt: int, output: int) -> None:
        sampling = SamplingParams(max_tokens=output, temperature=0.0)
        request = Request(request_id=request_id, prompt_ids=range(prompt), sampling=sampling)
        self.cluster.send(FRONTEND, CONTROLLER, Submit(FRONTEND, request))

    def flood(self) -> None:
        self.num_prompts += 1
        self.submit(f"prompt {self.num_prompts}", 3000, 1)
        self.cluster.loop.after(0.1, self.flood)

    def run(self, num_tokens: int, max_s: float) -> None:
        loop = self.cluster.loop
        while len(self.times_s) < num_tokens and loop.now_s < max_s:
            assert loop.step()


@pytest.mark.parametrize("slo", [SloConfig(), SloConfig(tpot_s=0.06)])
def test_decodes_keep_running_under_endless_prefills_on_one_that_becomes_a_prefill_instance(slo: SloConfig) -> None:
    stream = Stream(slo)
    stream.run(1, max_s=1.0)  # everyone is there
    stream.submit("long", 500, 400)
    stream.run(20, max_s=30.0)
    assert len(stream.times_s) >= 20
    [instance] = stream.cluster.instances.values()
    stream.cluster.send(CONTROLLER, instance.name, SetRole(Role.PREFILL))
    stream.flood()
    stream.run(400, max_s=400.0)
    assert len(stream.times_s) == 400
    assert instance.engine.scheduler.role is Role.PREFILL
    assert stream.num_prompts > 2 * stream.num_answered > 0  # prompts waited all the time, and did not starve
    gaps_s = np.diff(stream.times_s[40:])
    chunk = EngineConfig().max_batch_tokens
    longest_s = stream.cost.step_s(StepShape(chunk, 4000 * chunk, 1, 1000, 2))
    assert gaps_s.max() < 1.5 * longest_s  # one chunk at a time comes between
    if slo.tpot_s is not None:
        assert gaps_s.mean() <= slo.tpot_s
        assert np.quantile(gaps_s, 0.99) <= 1.1 * slo.tpot_s


def test_a_record_of_one_run_is_not_that_of_another() -> None:
    """Nothing is kept between two runs of one process."""
    first = simulate(FLEXIBLE, shifting(1, 20))
    records = [replace(record) for record in first.records]
    simulate(FLEXIBLE, shifting(2, 20))
    assert first.records == records
