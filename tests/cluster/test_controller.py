import pytest

from flowkv.errors import ProtocolError
from flowkv.messages import (
    Abort,
    Accepted,
    ClusterStatus,
    InstanceExited,
    Lost,
    Message,
    PeerDown,
    PeerInfo,
    PeerUp,
    Registered,
    RegistrationRefused,
    Rejected,
    Submit,
)
from flowkv.types import ModelInfo, Request, Role, SamplingParams
from tests.cluster.rig import STALL_S, Rig, prefill_step
from tests.pools import descriptor


def test_ready_when_all_have_registered_and_everyone_knows_everyone() -> None:
    rig = Rig(Role.PREFILL)
    rig.controller._num_instances = 2
    out = rig.register("decode-1", Role.DECODE)
    assert ("prefill-0", PeerUp(PeerInfo("decode-1", "decode-1", descriptor("decode-1")))) in out
    assert ("decode-1", PeerUp(PeerInfo("prefill-0", "prefill-0", descriptor("prefill-0")))) in out
    assert ("decode-1", Registered()) in out
    status = out[-1][1]
    assert isinstance(status, ClusterStatus) and status.ready and status.max_request_tokens == 1000


def test_a_prompt_goes_to_a_prefill_instance_and_names_who_decodes_best_first() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.report("decode-1", num_decoding=5)
    address, dispatch = rig.dispatch("r")
    assert address == "prefill-0"
    assert dispatch.decode_instances == ["decode-2", "decode-1"]


def test_mixed_instances_decode_what_they_prefill() -> None:
    rig = Rig(Role.MIXED, Role.MIXED)
    assert rig.dispatch("r")[1].decode_instances == []


def test_what_was_sent_since_the_last_report_counts() -> None:
    rig = Rig(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    placements = [rig.dispatch(f"r{i}") for i in range(4)]
    assert [address for address, _ in placements] == ["prefill-0", "prefill-1"] * 2
    assert [dispatch.decode_instances[0] for _, dispatch in placements] == ["decode-2", "decode-3"] * 2
    rig.report("prefill-0", sequence=placements[2][1].sequence)
    assert rig.dispatch("r4")[0] == "prefill-0"  # its report has seen both; those of prefill-1 are still on their way


def test_blocks_of_requests_on_their_way_count_as_taken() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.report("decode-2", num_decoding=5)
    assert rig.dispatch("large", num_tokens=1500)[1].decode_instances[0] == "decode-1"
    assert rig.dispatch("next", num_tokens=500)[1].decode_instances[0] == "decode-2"


def test_the_faster_instance_gets_the_longer_queue() -> None:
    rig = Rig(Role.PREFILL, Role.PREFILL, Role.DECODE)
    for _ in range(50):
        rig.report("prefill-0", steps=[prefill_step(100, 1.0)], waiting_tokens=100)
        rig.report("prefill-1", steps=[prefill_step(100, 0.1)], waiting_tokens=300)
    assert rig.dispatch("r")[0] == "prefill-1"


def test_one_that_cannot_be_held_anywhere_is_refused_and_costs_nothing() -> None:
    rig = Rig(Role.MIXED, num_blocks=2)
    [(address, answer)] = rig.submit("r", num_tokens=30, max_tokens=3)
    assert address == "f" and isinstance(answer, Rejected)
    assert answer.status == 400 and "32 tokens" in answer.message
    assert rig.controller.num_assignments == 0


def test_more_choices_than_any_instance_decodes_at_once_are_refused() -> None:
    rig = Rig(Role.MIXED)
    request = Request(request_id="r", prompt_ids=[1], sampling=SamplingParams(max_tokens=1, n=9))
    [(_, answer)] = rig.take(Submit("f", request))
    assert isinstance(answer, Rejected) and answer.status == 400 and "8 choices" in answer.message


def test_before_anyone_is_there_the_answer_is_503() -> None:
    controller = Rig()
    [(_, answer)] = controller.submit("r")
    assert isinstance(answer, Rejected) and answer.status == 503


def test_a_repeated_submit_runs_nothing_twice_not_even_after_the_end() -> None:
    rig = Rig(Role.MIXED)
    rig.submit("r")
    assert rig.submit("r") == [("f", Accepted("r"))]
    rig.take(rig.finished("mixed-0", "r"))
    assert rig.submit("r") == [("f", Accepted("r"))]
    assert rig.controller.num_assignments == 0


def test_an_abort_goes_to_all_who_may_hold_some_of_it() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.submit("r")
    assert {address for address, _ in rig.take(Abort("r"))} == {"prefill-0", "decode-1", "decode-2"}
    rig.take(rig.finished("prefill-0", "r"))
    assert {address for address, _ in rig.take(Abort("r"))} == {"prefill-0", "decode-1", "decode-2"}


def test_the_death_of_the_owner_is_told_to_all_and_the_frontend_has_the_say() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.submit("r")
    rig.take(rig.finished("prefill-0", handed_over=[("r", "decode-1")]))
    out = rig.take(InstanceExited("decode-1", "was killed"))
    assert ("prefill-0", PeerDown("decode-1")) in out and ("decode-2", PeerDown("decode-1")) in out
    assert ("f", Lost("r", died=True)) in out and ("prefill-0", Abort("r")) in out
    assert rig.controller.num_assignments == 0 and rig.status().num_lost == 1


def test_a_handoff_to_one_that_has_died_meanwhile_is_lost() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.submit("r")
    rig.take(InstanceExited("decode-1", "was killed"))
    out = rig.take(rig.finished("prefill-0", handed_over=[("r", "decode-1")]))
    assert ("f", Lost("r", died=True)) in out


def test_without_decode_instances_the_prefill_instance_decodes() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.take(InstanceExited("decode-1", "was killed"))
    address, dispatch = rig.dispatch("r")
    assert address == "prefill-0" and dispatch.decode_instances == []


def test_an_instance_of_another_layout_or_model_is_refused_at_registration() -> None:
    rig = Rig(Role.PREFILL)
    other = ModelInfo(name="other", dtype="float32", vocab_size=10, max_model_tokens=1000)
    for kwargs in ({"layout": "X"}, {"model": other}):
        out = rig.register("decode-1", Role.DECODE, **kwargs)
        assert [type(message) for _, message in out] == [RegistrationRefused]


def test_one_whose_end_was_told_before_it_registered_is_not_taken() -> None:
    rig = Rig(Role.MIXED)
    rig.take(InstanceExited("mixed-1", "was killed"))
    assert rig.register("mixed-1", Role.MIXED) == []
    assert rig.dispatch("r")[0] == "mixed-0"


def test_a_message_for_somebody_else_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="PeerDown"):
        Rig(Role.MIXED).take(PeerDown("x"))


def test_a_silent_instance_is_stalled_and_what_it_owns_is_lost() -> None:
    rig = Rig(Role.PREFILL, Role.PREFILL, Role.DECODE)
    assert [rig.dispatch(r)[0] for r in ("on its way", "elsewhere", "decoding")] == [
        "prefill-0",
        "prefill-1",
        "prefill-0",
    ]
    rig.take(rig.finished("prefill-0", handed_over=[("decoding", "decode-2")]))
    assert rig.wait(STALL_S - 1, "prefill-1", "decode-2") == []
    out = rig.wait(1, "prefill-1", "decode-2")
    assert [message for _, message in out if isinstance(message, Lost)] == [Lost("on its way", died=True)]
    assert {address for address, message in out if message == Abort("on its way")} == {"prefill-0", "decode-2"}
    assert rig.controller.num_assignments == 2
    assert [status.is_stalled for status in rig.status().instances] == [True, False, False]
    rig.take(Abort("on its way"))  # nobody waits for it
    assert rig.wait(STALL_S, "prefill-1", "decode-2") == []


def test_a_stalled_instance_gets_nothing_until_it_is_heard_again() -> None:
    rig = Rig(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.wait(STALL_S, "prefill-1", "decode-3")
    address, dispatch = rig.dispatch("r")
    assert (address, dispatch.decode_instances) == ("prefill-1", ["decode-3"])
    rig.take(rig.finished("prefill-0"))
    rig.take(rig.finished("decode-2"))
    address, dispatch = rig.dispatch("s")
    assert address == "prefill-0" and set(dispatch.decode_instances) == {"decode-2", "decode-3"}
    assert not any(status.is_stalled for status in rig.status().instances)


def test_with_every_instance_stalled_the_answer_is_503() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    assert rig.status().ready
    rig.wait(STALL_S)
    assert not rig.status().ready
    [(_, answer)] = rig.submit("r")
    assert isinstance(answer, Rejected) and answer.status == 503 and "stalled" in answer.message
    rig.take(rig.finished("decode-1"))
    assert rig.dispatch("s")[0] == "decode-1"


def test_an_instance_may_be_silent_for_as_long_as_its_steps_need() -> None:
    rig = Rig(Role.PREFILL)
    rig.report("prefill-0", steps=[prefill_step(10, 1.0)] * 100)
    rig.dispatch("r", num_tokens=1000)
    assert rig.wait(9) == []  # ten steps' time
    assert rig.wait(2) != []


def test_the_first_prompt_of_an_instance_may_take_a_minute() -> None:
    rig = Rig(Role.PREFILL)
    rig.dispatch("r")
    assert rig.wait(59) == []
    assert rig.wait(1) != []


def test_a_controller_that_was_stopped_itself_takes_nobody_for_stalled() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.now_s += 1000.0
    assert rig.wait(1) == []
    assert rig.status().ready


def test_a_handoff_that_only_a_stalled_instance_could_answer_for_is_lost() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.submit("r")
    rig.wait(STALL_S - 1, "prefill-0")
    assert rig.take(rig.finished("prefill-0", unanswered=[("r", "decode-1")])) == []
    out = rig.wait(1, "prefill-0")
    assert out == []  # the last word of the prefill instance was that it has been answered
    out = rig.take(rig.finished("prefill-0", unanswered=[("r", "decode-1")]))
    assert ("prefill-0", Abort("r")) in out and ("decode-1", Abort("r")) in out
    assert [m for _, m in out if isinstance(m, Lost)] == [Lost("r")]


def test_a_handoff_that_nobody_answers_for_is_lost_even_if_the_peer_is_heard_by_others() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.submit("r")
    for second in range(1, STALL_S):
        rig.take(rig.finished("prefill-0", unanswered=[("r", "decode-1")]))
        assert rig.wait(1, "decode-1") == [], second
    out = rig.take(rig.finished("prefill-0", unanswered=[("r", "decode-1")])) + rig.wait(1, "decode-1")
    assert [m for _, m in out if isinstance(m, Lost)] == [Lost("r")]


def test_who_waits_for_an_answer_to_what_has_ended_is_told_once_a_report() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.submit("r")
    rig.take(rig.finished("decode-1", "r"))
    assert rig.take(rig.finished("prefill-0", unanswered=[("r", "decode-1")])) == [("prefill-0", Abort("r"))]
    assert rig.wait(2, "decode-1") == []


def test_a_handoff_to_one_that_has_stalled_meanwhile_is_lost() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.submit("r")
    rig.wait(STALL_S, "prefill-0")
    out = rig.take(rig.finished("prefill-0", handed_over=[("r", "decode-1")]))
    assert [m for _, m in out if isinstance(m, Lost)] == [Lost("r", died=True)]


def test_the_new_owner_may_be_the_first_to_say_so() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.submit("r")
    rig.take(rig.finished("decode-1", handed_over=[("r", "decode-1")]))
    assert not any(isinstance(m, Rejected) for _, m in rig.take(InstanceExited("prefill-0", "was killed")))
    rig.take(rig.finished("decode-1", "r"))
    assert rig.controller.num_assignments == 0


def test_a_newcomer_does_not_wait_for_a_link_to_a_stalled_instance() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.wait(STALL_S, "prefill-0")
    rig.come("decode-9", Role.DECODE)
    rig.links_up("prefill-0", "decode-9")
    assert ("decode-9", Registered()) in rig.links_up("decode-9", "prefill-0")


def test_a_dispatch_that_has_not_come_to_an_instance_that_lives_is_lost() -> None:
    rig = Rig(Role.MIXED)
    rig.dispatch("came")
    rig.report("mixed-0")
    _, dispatch = rig.dispatch("broken")
    out: list[tuple[str, Message]] = []
    for _ in range(10):
        rig.now_s += 1.0
        assert not [m for _, m in out if isinstance(m, Lost)]
        out += rig.report("mixed-0", sequence=dispatch.sequence - 1)
        if out[-1:] and any(isinstance(m, Lost) for _, m in out):
            break
    assert [m for _, m in out if isinstance(m, Lost)] == [Lost("broken")]
    assert rig.now_s > 5.0 and rig.controller.num_assignments == 1


def test_the_report_at_the_end_of_a_long_step_does_not_know_what_came_during_it() -> None:
    rig = Rig(Role.MIXED)
    _, dispatch = rig.dispatch("r")
    rig.now_s += 60.0
    assert not [m for _, m in rig.report("mixed-0", sequence=dispatch.sequence - 1) if isinstance(m, Lost)]
    rig.now_s += 60.0
    assert not [m for _, m in rig.report("mixed-0") if isinstance(m, Lost)]


def test_a_claim_of_what_runs_is_accepted_and_of_what_has_ended_is_lost() -> None:
    rig = Rig(Role.MIXED)
    rig.submit("r")
    request = Request(request_id="r", prompt_ids=range(20), sampling=SamplingParams(max_tokens=10))
    assert rig.take(Submit("f", request, is_claim=True)) == [("f", Accepted("r"))]
    rig.take(rig.finished("mixed-0", "r"))
    assert rig.take(Submit("f", request, is_claim=True)) == [("f", Lost("r"))]


def test_links_to_the_dead_are_forgotten() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.take(InstanceExited("decode-1", "was killed"))
    [status] = rig.status().instances
    assert status.links == []
