"""What the controller does with what it has sent, and with more than can be done."""

from collections import Counter

import pytest

from flowkv.config import SchedulingConfig, SloConfig
from flowkv.messages import Accepted, Rejected, Submit
from flowkv.types import Request, Role, SamplingParams
from tests.cluster.rig import Rig, dispatches, of_type

FLEXIBLE = SchedulingConfig()
P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def rig_of(*roles: Role, scheduling: SchedulingConfig = FLEXIBLE, slo: SloConfig | None = None) -> Rig:
    """Instances that are all known to compute 1,000 prompt tokens a second."""
    rig = Rig(*roles, num_blocks=10_000, max_choices=64, scheduling=scheduling, slo=slo)
    for name in rig.names:
        rig.teach(name, token_s=1e-3, choice_s=1e-4)
    return rig


# --- placement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["predicted_latency", "least_loaded"])
@pytest.mark.parametrize("roles", ["flexible", "fixed"])
def test_many_placements_without_a_report_spread(policy: str, roles: str) -> None:
    rig = rig_of(*[P] * 4, *[D] * 4, scheduling=SchedulingConfig(roles=roles, policy=policy))
    placements = [rig.dispatch(f"r{i}", num_tokens=500, max_tokens=100) for i in range(160)]
    prefills = Counter(address for address, _ in placements)
    homes = Counter(d.decode_instances[0] if d.decode_instances else address for address, d in placements)
    assert all(prefills[f"prefill-{i}"] >= 10 for i in range(4)), prefills
    assert all(homes[f"decode-{i}"] >= 10 for i in range(4, 8)), homes
    assert max(prefills.values()) <= 2 * 40 and max(homes.values()) <= 2 * 40


def test_mixed_instances_share_what_comes_between_two_reports() -> None:
    rig = rig_of(*[M] * 8)
    prefills = Counter(rig.dispatch(f"r{i}", num_tokens=500, max_tokens=100)[0] for i in range(80))
    assert len(prefills) == 8 and max(prefills.values()) - min(prefills.values()) <= 3


def test_what_goes_on_elsewhere_counts_with_what_it_had_put_out() -> None:
    rig = rig_of(M, M)
    request = Request(request_id="x~1", prompt_ids=range(10), sampling=SamplingParams(max_tokens=600))
    [(first, _)] = dispatches(rig.take(Submit("f", request, {0: [1] * 500}, resumes="x")))
    others = {rig.dispatch(f"r{i}", num_tokens=50, max_tokens=1)[0] for i in range(5)}
    assert others == {"mixed-0", "mixed-1"} - {first}


def test_one_that_is_known_to_be_faster_gets_more() -> None:
    rig = Rig(M, M, num_blocks=10_000, max_choices=64, scheduling=FLEXIBLE)
    rig.teach("mixed-0", decode_s=0.04, token_s=8e-4, choice_s=4e-4)
    rig.teach("mixed-1", decode_s=0.01, token_s=2e-4, choice_s=1e-4)
    prefills = Counter(rig.dispatch(f"r{i}", num_tokens=500, max_tokens=100)[0] for i in range(60))
    assert prefills["mixed-1"] > 2 * prefills["mixed-0"]


def test_what_a_report_echoes_counts_once() -> None:
    rig = rig_of(M, M)
    for i in range(10):
        rig.dispatch(f"r{i}", num_tokens=500)
    waiting = {name: 500 * sum(1 for _ in range(5)) for name in rig.names}
    for name in rig.names:
        rig.report(name, waiting_tokens=waiting[name])
    rig.report("mixed-0", waiting_tokens=waiting["mixed-0"] - 1000)  # it has computed two meanwhile
    assert [rig.dispatch(f"s{i}", num_tokens=400)[0] for i in range(2)] == ["mixed-0", "mixed-0"]


def test_what_no_report_has_echoed_yet_still_counts() -> None:
    rig = rig_of(M, M)
    address, dispatch = rig.dispatch("long", num_tokens=5000)
    other = ({"mixed-0", "mixed-1"} - {address}).pop()
    rig.report(address, dispatch.sequence - 1)  # from before it came
    assert rig.dispatch("r", num_tokens=500)[0] == other
    rig.report(other)
    rig.report(address, dispatch.sequence - 1)
    assert rig.dispatch("s", num_tokens=500)[0] == other
    rig.report(address, dispatch.sequence)
    assert rig.dispatch("t", num_tokens=500)[0] == address


def test_answers_that_ended_tell_how_long_the_next_will_be() -> None:
    rig = Rig(M, num_blocks=100, scheduling=SchedulingConfig(kv_budget=1.0))
    for i in range(4):
        rig.submit(f"r{i}", 100, 900)
        rig.report("mixed-0", finished=[(f"r{i}", 10)])
    # 1,600 slots: as long as they might be, one would fit
    answers = [dispatches(rig.submit(f"s{i}", 100, 900)) for i in range(12)]
    assert all(answers)


# --- returned ------------------------------------------------------------------------------------------------------


def test_what_is_returned_is_placed_again_once() -> None:
    rig = rig_of(P, P, D)
    address, dispatch = rig.dispatch("r", num_tokens=500)
    out = rig.report(address, returned=["r"], waiting_tokens=10_000)
    [(again, second)] = dispatches(out)
    assert again != address and second.request == dispatch.request
    assert of_type(out, Accepted) == [] and rig.controller.num_assignments == 1
    assert dispatches(rig.report(address)) == []
    rig.report(again, finished=[("r", 10)])
    assert rig.controller.num_assignments == 0
    assert dispatches(rig.report(address, returned=["r"])) == []  # it is over


def test_what_is_returned_leaves_no_trace_where_it_was() -> None:
    rig = rig_of(M, M, scheduling=SchedulingConfig(kv_budget=1.0))
    address, _ = rig.dispatch("r", num_tokens=500)
    [(again, _)] = dispatches(rig.report(address, returned=["r"], waiting_tokens=10_000))
    assert again != address
    rig.report(again, finished=[("r", 10)])
    for name in rig.names:
        rig.report(name)
    assert {rig.dispatch(f"s{i}")[0] for i in range(2)} == set(rig.names)


# --- SLO -----------------------------------------------------------------------------------------------------------


def test_a_request_that_will_be_late_anyway_lets_others_pass() -> None:
    rig = rig_of(M, slo=SloConfig(ttft_s=1.0))
    assert not rig.dispatch("in time", num_tokens=100)[1].request.is_deferred
    rig.report("mixed-0", waiting_tokens=5000)
    sequence = rig.sequences["mixed-0"]
    late = rig.dispatch("late", num_tokens=3000)[1].request
    assert late.is_deferred and late.request_id == "late"
    rig.report("mixed-0", sequence)  # the queue is gone, the late one is still on its way
    assert not rig.dispatch("next", num_tokens=100)[1].request.is_deferred
    rig.report("mixed-0", deferred_tokens=50_000)
    assert not rig.dispatch("one more", num_tokens=100)[1].request.is_deferred


def test_where_the_order_is_to_be_kept_nobody_is_deferred() -> None:
    rig = rig_of(M, slo=SloConfig(ttft_s=1.0, late_last=False))
    rig.report("mixed-0", waiting_tokens=5000)
    assert not rig.dispatch("late", num_tokens=600)[1].request.is_deferred


def test_what_has_been_deferred_stays_so_when_it_is_placed_again() -> None:
    rig = rig_of(M, M, slo=SloConfig(ttft_s=1.0))
    for name in rig.names:
        rig.report(name, waiting_tokens=5000)
    address, first = rig.dispatch("late", num_tokens=600)
    [(_, second)] = dispatches(rig.report(address, returned=["late"], waiting_tokens=5000))
    assert second.request.priority == first.request.priority


def test_what_has_been_deferred_is_so_no_more_when_it_is_placed_again_in_time() -> None:
    rig = rig_of(M, M, slo=SloConfig(ttft_s=1.0))
    for name in rig.names:
        rig.report(name, waiting_tokens=5000)
    address, first = rig.dispatch("late", num_tokens=600)
    rig.report(next(name for name in rig.names if name != address))
    [(_, second)] = dispatches(rig.report(address, returned=["late"]))
    assert first.request.is_deferred and not second.request.is_deferred


def admitting(*roles: Role) -> Rig:
    return rig_of(*roles, slo=SloConfig(ttft_s=1.0, admission=True))


def test_with_admission_a_request_that_would_be_late_is_refused_and_told_when_to_come_back() -> None:
    rig = admitting(M)
    rig.report("mixed-0", waiting_tokens=8000)
    [(address, answer)] = rig.submit("r", 100)
    assert address == "f" and isinstance(answer, Rejected)
    assert (answer.status, answer.code) == (429, "overloaded")
    assert answer.retry_after_s is not None and 5 < answer.retry_after_s < 15
    assert rig.controller.num_assignments == 0 and rig.status().num_refused == 1
    rig.report("mixed-0")
    assert rig.submit("r", 100) == [("f", answer)]  # a repetition changes nothing
    assert rig.status().num_refused == 1
    assert dispatches(rig.submit("s", 100))


def test_with_admission_a_request_is_served_in_time_or_refused_and_never_put_behind_all_others() -> None:
    rig = admitting(M)
    answers = list[str]()
    for waiting in range(0, 2000, 10):
        rig.report("mixed-0", waiting_tokens=waiting)
        out = rig.submit(f"r{waiting}", 100)
        answers += ["deferred" if d.request.is_deferred else "served" for _, d in dispatches(out)]
        answers += ["refused" for _ in of_type(out, Rejected)]
    assert set(answers) == {"served", "refused"}
    assert answers == sorted(answers, reverse=True)


def test_with_admission_waiting_for_a_place_to_decode_counts_as_much_as_prompts_do() -> None:
    """64 choices run at once, and each for seconds: an idle prefill does not help who comes next."""
    rig = admitting(M)
    for i in range(64):
        assert dispatches(rig.submit(f"r{i}", 1, max_tokens=2000))
        rig.report("mixed-0", num_decoding=i + 1)
    is_in = [bool(dispatches(rig.submit(f"s{i}", 1, max_tokens=2000))) for i in range(20)]
    assert is_in == sorted(is_in, reverse=True) and 1 <= sum(is_in) <= 10  # for these a place will be free in time
    rig.report("mixed-0", finished=[(f"r{i}", 2000) for i in range(64)])
    assert dispatches(rig.submit("now there is room", 1, max_tokens=2000))


def test_with_admission_so_does_waiting_for_room_in_the_pool() -> None:
    rig = Rig(M, num_blocks=100, max_choices=64, slo=SloConfig(ttft_s=1.0, admission=True))  # 1,600 slots
    rig.teach("mixed-0", token_s=1e-5)
    answers = [bool(dispatches(rig.submit(f"r{i}", 100, max_tokens=200))) for i in range(30)]
    assert answers == sorted(answers, reverse=True) and 5 <= sum(answers) <= 15


def test_nobody_is_refused_while_one_instance_is_free() -> None:
    rig = admitting(M, M)
    rig.report("mixed-0", waiting_tokens=8000)
    assert rig.dispatch("r", num_tokens=100)[0] == "mixed-1"


def test_priorities_decide_who_is_refused_first() -> None:
    rig = admitting(M)
    rig.report("mixed-0", waiting_tokens=600)
    assert of_type(rig.submit("later", 100, priority=1), Rejected)
    assert dispatches(rig.submit("usual", 100, priority=0))
    rig.report("mixed-0", waiting_tokens=8000)
    assert of_type(rig.submit("usual too", 100, priority=0), Rejected)
    [(_, dispatch)] = dispatches(rig.submit("urgent", 100, priority=-1))
    assert dispatch.request.priority == -1


def test_while_nothing_is_known_of_costs_nobody_is_refused_or_deferred() -> None:
    rig = Rig(M, num_blocks=10_000, scheduling=FLEXIBLE, slo=SloConfig(ttft_s=0.01, admission=True))
    for i in range(5):
        assert not rig.dispatch(f"r{i}", num_tokens=900)[1].request.is_deferred


def test_the_kv_budget_bounds_what_is_promised() -> None:
    rig = Rig(M, num_blocks=100, scheduling=SchedulingConfig(kv_budget=1.0))  # 1,600 slots
    assert dispatches(rig.submit("a", 700, 100)) and dispatches(rig.submit("b", 700, 100))
    [refusal] = of_type(rig.submit("c", 700, 100), Rejected)
    assert (refusal.status, refusal.code) == (429, "overloaded")
    assert refusal.retry_after_s is not None and refusal.retry_after_s > 0
    rig.report("mixed-0", finished=[("a", 100)])
    assert dispatches(rig.submit("d", 700, 100))


def test_without_a_budget_more_is_promised_than_fits() -> None:
    rig = Rig(M, num_blocks=100, scheduling=FLEXIBLE)
    assert all(dispatches(rig.submit(f"r{i}", 700, 100)) for i in range(10))
