"""One engine, message by message, where the order of things matters and random interleavings would rarely show it."""

import msgspec
import pytest

from flowkv.config import EngineConfig
from flowkv.engine.batch import BatchResult, Draw, ItemResult
from flowkv.engine.effects import Send, Write
from flowkv.engine.engine import Engine
from flowkv.errors import ProtocolError
from flowkv.messages import (
    Abort,
    Cancel,
    CancelAck,
    Dispatch,
    Drain,
    KvReady,
    LoadReport,
    Message,
    Outputs,
    PeerInfo,
    PeerUp,
    Refused,
    Renew,
    Renewed,
    Reserve,
    Reserved,
    SetRole,
    StepSample,
)
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.types import FinishReason, Request, Role, SamplingParams
from tests.pools import descriptor

LEASE_S = 6.0
CONFIG = EngineConfig(block_size=4, max_batch_tokens=16, max_choices=8)


def make_engine(num_blocks: int = 8) -> Engine:
    engine = Engine("me", CONFIG, num_blocks, Role.PREFILL, "controller", LEASE_S)
    engine.handle(PeerUp(PeerInfo("peer", "peer", descriptor("peer"))), 0.0)
    engine.on_linked(Linked("peer", "local"), 0.0)
    engine.take_effects()
    return engine


def make_request(request_id: str, num_prompt: int, max_tokens: int = 4) -> Request:
    return Request(
        request_id=request_id, prompt_ids=[5] * num_prompt, sampling=SamplingParams(max_tokens=max_tokens)
    )  # fmt: skip


def step(engine: Engine, seconds: float = 0.01) -> None:
    batch = engine.next_batch(0.0)
    assert batch is not None
    items = [ItemResult([Draw(9) for _ in item.draws]) for item in batch.items]
    engine.on_result(BatchResult(batch.batch_id, items), seconds, 0.0)


def sent_to(engine: Engine, address: str) -> list[Message]:
    return [e.message for e in engine.take_effects() if isinstance(e, Send) and e.address == address]


def last_report(engine: Engine) -> LoadReport:
    report = sent_to(engine, "controller")[-1]
    assert isinstance(report, LoadReport)
    return report


def test_an_aborted_request_keeps_its_blocks_while_they_are_being_sent() -> None:
    engine = make_engine()
    engine.handle(Dispatch(1, make_request("r", 24), "f", ["peer"]), 0.0)
    step(engine)
    engine.handle(Reserved("peer", "r", 1, 7, [0, 1, 2, 3, 4, 5]), 0.0)
    [write] = [effect for effect in engine.take_effects() if isinstance(effect, Write)]
    engine.handle(Abort("r"), 0.0)
    assert engine.blocks.num_free == 2
    engine.on_written(Written(write.ticket, 1, 0.1, 0.1), 0.0)
    assert engine.blocks.num_free == 8
    assert engine.is_idle


def test_an_aborted_request_keeps_its_blocks_while_they_are_being_computed() -> None:
    engine = make_engine()
    engine.handle(Dispatch(1, make_request("r", 8), "f", []), 0.0)
    batch = engine.next_batch(0.0)
    assert batch is not None
    engine.handle(Abort("r"), 0.0)
    assert engine.blocks.num_free == 6
    engine.on_result(BatchResult(batch.batch_id, [ItemResult([Draw(9)])]), 0.01, 0.0)
    assert engine.blocks.num_free == 8
    assert engine.is_idle


def test_a_dispatch_that_comes_twice_runs_once() -> None:
    engine = make_engine()
    for _ in range(2):
        engine.handle(Dispatch(1, make_request("r", 8, max_tokens=1), "f", []), 0.0)
    step(engine)
    engine.check_integrity()
    assert engine.is_idle and engine.blocks.num_free == 8


def test_more_choices_than_can_ever_run_end_at_once() -> None:
    engine = make_engine()
    request = msgspec.structs.replace(make_request("r", 1), sampling=SamplingParams(max_tokens=4, n=9))
    engine.handle(Dispatch(1, request, "f", []), 0.0)
    [message] = sent_to(engine, "f")
    assert isinstance(message, Outputs) and len(message.outputs) == 9
    assert {output.finish_reason for output in message.outputs} == {FinishReason.ERROR}
    assert engine.is_idle


@pytest.mark.parametrize("block_ids", [[0, 10**6], [-1, 0], [3, 3]])
def test_blocks_that_a_peer_has_not_are_never_written(block_ids: list[int]) -> None:
    engine = make_engine()
    engine.handle(Dispatch(1, make_request("r", 8), "f", ["peer"]), 0.0)
    step(engine)
    with pytest.raises(ProtocolError, match="has not"):
        engine.handle(Reserved("peer", "r", 1, 7, block_ids), 0.0)
    assert not any(isinstance(effect, Write) for effect in engine.take_effects())


def test_a_standstill_takes_back_the_youngest_reservation_and_only_one() -> None:
    engine = make_engine()
    for attempt, request_id in ((1, "old"), (2, "young")):
        engine.handle(Reserve("peer", attempt, make_request(request_id, 8), "f"), 0.0)
    engine.handle(Dispatch(1, make_request("mine", 24), "f", []), 0.0)
    engine.take_effects()
    assert engine.next_batch(0.0) is None
    assert engine.next_batch(0.0) is None
    sent = [effect for effect in engine.take_effects() if isinstance(effect, Send)]
    assert sent == [Send("peer", Cancel("me", "young", 2))]


def test_those_who_wait_here_come_before_newcomers_from_elsewhere() -> None:
    engine = make_engine(num_blocks=10)
    engine.handle(Reserve("peer", 1, make_request("held", 16), "f"), 0.0)
    engine.handle(Dispatch(1, make_request("mine", 28), "f", []), 0.0)  # seven blocks, six are free
    assert engine.next_batch(0.0) is None
    engine.take_effects()
    engine.handle(Reserve("peer", 2, make_request("newcomer", 8), "f"), 0.0)
    sent = [effect.message for effect in engine.take_effects() if isinstance(effect, Send)]
    assert sent == [Refused("me", "newcomer", 2)]


def test_a_report_follows_the_end_of_a_request_at_once_and_echoes_its_dispatch() -> None:
    engine = make_engine()
    engine.handle(Dispatch(41, make_request("r", 4, max_tokens=1), "f", []), 0.0)
    engine.take_effects()
    step(engine)
    reports = [e.message for e in engine.take_effects() if isinstance(e, Send) and isinstance(e.message, LoadReport)]
    assert [(report.sequence, report.finished) for report in reports] == [(41, [("r", 1)])]
    assert reports[0].load.free_blocks == 8
    assert [(s.prefill_tokens, s.decode_choices) for s in reports[0].steps] == [(4, 0)]


def test_a_lease_that_runs_out_is_reported_and_so_are_the_blocks_in_quarantine() -> None:
    engine = make_engine()
    engine.handle(Reserve("peer", 1, make_request("r", 8), "f"), 0.0)
    for now_s in range(0, 4):
        engine.tick(float(now_s) * LEASE_S / 3)
    assert Cancel("me", "r", 1) in sent_to(engine, "peer")
    engine.tick(LEASE_S + 1.0)
    report = last_report(engine)
    assert report.counters.num_expired_leases == 1
    assert (report.load.quarantined_blocks, report.load.used_blocks) == (2, 2)
    engine.handle(CancelAck("peer", "r", 1), 100.0)
    assert engine.load.quarantined_blocks == engine.load.used_blocks == 0


def test_who_takes_a_request_over_tells_the_controller() -> None:
    engine = make_engine()
    engine.handle(Reserve("peer", 1, make_request("r", 8), "f"), 0.0)
    engine.on_arrived(Arrived(1, 2), 0.0)
    engine.handle(KvReady("peer", "r", 1, 2, {0: [9]}), 0.0)
    assert last_report(engine).handed_over == [("r", "me")]


def test_what_a_silent_instance_may_own_is_reported_until_it_is_heard() -> None:
    engine = make_engine()
    engine.handle(Dispatch(1, make_request("r", 8), "f", ["peer"]), 0.0)
    step(engine)
    engine.handle(Reserved("peer", "r", 1, 7, [0, 1]), 0.0)
    for now_s in range(0, 4):
        engine.tick(float(now_s) * LEASE_S / 3)
    engine.tick(LEASE_S + 1.0)
    assert last_report(engine).unanswered == [("r", "peer")]
    engine.handle(Renewed("peer", LEASE_S), LEASE_S + 1.0)
    engine.tick(LEASE_S + 2.0)
    assert last_report(engine).unanswered == []


def test_long_steps_ask_for_a_long_lease() -> None:
    engine = make_engine()
    engine.handle(Dispatch(1, make_request("r", 8), "f", []), 0.0)
    step(engine, seconds=10 * LEASE_S)
    engine.handle(Renew("peer", []), 0.0)
    assert Renewed("me", 40 * LEASE_S) in sent_to(engine, "peer")


def reports(engine: Engine) -> list[LoadReport]:
    return [message for message in sent_to(engine, "controller") if isinstance(message, LoadReport)]


def test_a_flip_takes_effect_at_once_keeps_what_runs_and_gives_back_what_has_not_begun() -> None:
    engine = make_engine()
    engine.handle(Dispatch(1, make_request("runs", 24), "f", []), 0.0)
    step(engine)
    engine.handle(Dispatch(2, make_request("waits", 8), "f", ["peer"]), 0.0)
    engine.take_effects()
    engine.handle(SetRole(Role.DECODE), 0.001)
    [report] = reports(engine)
    assert (report.role, report.returned, report.finished) == (Role.DECODE, ["waits"], [])
    assert (report.load.num_prefilling, report.load.num_waiting, report.load.used_blocks) == (1, 0, 6)
    engine.handle(Abort("waits"), 0.001)
    step(engine)
    engine.take_effects()
    engine.handle(SetRole(Role.PREFILL), 0.002)
    [report] = reports(engine)
    assert (report.role, report.returned, report.load.num_decoding) == (Role.PREFILL, [], 1)
    engine.check_integrity()


def test_what_is_aborted_first_is_not_given_back_and_what_was_preempted_is_kept() -> None:
    engine = make_engine(num_blocks=4)
    engine.handle(Dispatch(1, make_request("old", 8, max_tokens=8), "f", []), 0.0)
    step(engine)
    engine.handle(Dispatch(2, make_request("young", 4, max_tokens=8), "f", []), 0.0)
    while engine.load.num_preempted == 0:
        step(engine)
    engine.handle(Dispatch(3, make_request("gone", 4), "f", []), 0.0)
    engine.handle(Abort("gone"), 0.0)
    engine.take_effects()
    engine.handle(SetRole(Role.DECODE), 0.0)
    [report] = reports(engine)
    assert (report.returned, report.load.num_waiting, report.load.num_preempted) == ([], 1, 1)
    assert report.load.waiting_tokens > 4  # what it had put out is computed again


def test_a_drained_instance_finishes_gives_back_refuses_and_says_so_once() -> None:
    engine = make_engine(num_blocks=16)
    engine.handle(Dispatch(1, make_request("runs", 8, max_tokens=3), "f", []), 0.0)
    step(engine)
    engine.handle(Dispatch(2, make_request("waits", 8), "f", []), 0.0)
    engine.take_effects()
    engine.handle(Drain(), 0.0)
    engine.handle(Dispatch(3, make_request("late", 8), "f", []), 0.0)
    engine.handle(Reserve("peer", 1, make_request("other", 8), "f"), 0.0)
    effects = engine.take_effects()
    sent = [effect.message for effect in effects if isinstance(effect, Send)]
    assert Refused("me", "other", 1) in sent
    told = [message for message in sent if isinstance(message, LoadReport)]
    assert [(r.returned, r.sequence, r.is_drained) for r in told] == [(["waits"], 2, False), (["late"], 3, False)]
    step(engine)
    assert not any(report.is_drained for report in reports(engine))
    step(engine)
    [report] = reports(engine)
    assert report.is_drained and report.finished == [("runs", 3)] and report.load.used_blocks == 0
    engine.tick(0.5)
    assert reports(engine) == []


def test_an_idle_instance_is_drained_at_once() -> None:
    engine = make_engine()
    engine.handle(Drain(), 0.0)
    assert [report.is_drained for report in reports(engine)] == [True]


def test_what_goes_on_after_output_elsewhere_is_older_than_what_waits_for_its_first_token() -> None:
    engine = make_engine(num_blocks=16)
    engine.handle(Dispatch(1, make_request("first", 24), "f", []), 0.0)
    engine.handle(Dispatch(2, make_request("second", 8), "f", []), 0.0)
    for sequence, name in ((3, "lost"), (4, "lost later")):
        engine.handle(Dispatch(sequence, make_request(name, 8), "f", [], output_ids={0: [9]}), 0.0)
    assert [waiting.request.request_id for waiting in engine.scheduler.waiting] == [
        "lost",
        "lost later",
        "first",
        "second",
    ]


def test_finished_counts_the_tokens_of_all_choices() -> None:
    engine = make_engine(num_blocks=32)
    sampling = SamplingParams(max_tokens=5, n=3)
    engine.handle(Dispatch(1, Request(request_id="r", prompt_ids=range(8), sampling=sampling), "f", []), 0.0)
    while engine.has_work:
        step(engine)
    assert reports(engine)[-1].finished == [("r", 15)]


def test_reports_are_quick_after_prompts_and_slow_while_only_decoding() -> None:
    engine = make_engine(num_blocks=100)
    engine.tick(10.0)
    times_s = []
    now_s = 10.0
    engine.handle(Dispatch(1, make_request("r", 32, max_tokens=300), "f", []), now_s)
    engine.take_effects()
    for _ in range(250):
        batch = engine.next_batch(now_s)
        assert batch is not None
        now_s += 1 / 64
        items = [ItemResult([Draw(9) for _ in item.draws]) for item in batch.items]
        engine.on_result(BatchResult(batch.batch_id, items), 1 / 64, now_s)
        times_s += [now_s - 10.0 for _ in reports(engine)]
    assert times_s == [4 / 64, 1 + 4 / 64, 2 + 4 / 64, 3 + 4 / 64]


def last_sample(engine: Engine) -> list[StepSample]:
    """Of what has not been reported yet."""
    engine.tick(100.0)
    return reports(engine)[-1].steps


def test_samples_say_what_steps_did_and_those_that_only_decode_come_as_their_sum() -> None:
    engine = make_engine(num_blocks=64)
    engine.handle(Dispatch(1, make_request("r", 20, max_tokens=9), "f", []), 0.0)
    engine.take_effects()
    for _ in range(6):
        step(engine)
    assert last_sample(engine) == [
        StepSample(16, 16 * 17 // 2, 0, 0, 0.01),
        StepSample(4, 4 * 16 + 10, 0, 0, 0.01),
        StepSample(0, 0, 4, 21 + 22 + 23 + 24, 0.01 + 0.01 + 0.01 + 0.01, 4),
    ]


def test_links_are_reported_when_they_have_news() -> None:
    engine = make_engine()
    engine.tick(5.0)
    assert reports(engine)[0].links == []
    engine.handle(Dispatch(1, make_request("r", 8), "f", ["peer"]), 5.0)
    step(engine)
    engine.handle(Reserved("peer", "r", 1, 7, [0, 1]), 5.0)
    engine.tick(7.0)
    assert [(link.peer, link.num_calls) for link in reports(engine)[-1].links] == [("peer", 1)]
    engine.tick(9.0)
    assert reports(engine)[-1].links == []


def priced_step(engine: Engine) -> list[int]:
    """A step that takes 20 ms, and 10 ms more for each prompt token; the sizes of its chunks."""
    batch = engine.next_batch(0.0)
    assert batch is not None
    chunks = [item.num_tokens for item in batch.items if not item.sequence.is_decoding]
    assert len(chunks) == len(batch.items) - len(engine.scheduler.decoding)
    items = [ItemResult([Draw(9) for _ in item.draws]) for item in batch.items]
    engine.on_result(BatchResult(batch.batch_id, items), 0.02 + 0.01 * sum(chunks), 0.0)
    return chunks


def test_a_bound_on_itl_shrinks_chunks_beside_decodes_but_never_below_a_block() -> None:
    chunks = {}
    for max_itl_s in (None, 1.0, 0.12, 0.02):
        engine = Engine("me", CONFIG, 512, Role.MIXED, "controller", LEASE_S, max_itl_s)
        engine.handle(Dispatch(1, make_request("runs", 4, max_tokens=400), "f", []), 0.0)
        for i in range(40):
            request = make_request(f"r{i}", 4 + 3 * (i % 4), max_tokens=1)
            engine.handle(Dispatch(2 + i, request, "f", []), 0.0)
        while engine.load.waiting_tokens:
            priced_step(engine)
        engine.handle(Dispatch(99, make_request("long", 100), "f", []), 0.0)
        chunks[max_itl_s] = priced_step(engine)
    assert chunks == {None: [8], 1.0: [16], 0.12: [8], 0.02: [4]}


def test_a_running_decode_puts_out_a_token_in_every_step_under_endless_prefills() -> None:
    for role in Role:
        engine = Engine("me", CONFIG, 512, role, "controller", LEASE_S, 0.12)
        engine.handle(Dispatch(0, make_request("runs", 4, max_tokens=400), "f", []), 0.0)
        priced_step(engine)
        engine.take_effects()
        for i in range(1, 100):
            engine.handle(Dispatch(i, make_request(f"r{i}", 30, max_tokens=1), "f", []), 0.0)
            assert priced_step(engine)
            outputs = [o for message in sent_to(engine, "f") if isinstance(message, Outputs) for o in message.outputs]
            assert [o.index for o in outputs if o.request_id == "runs"] == [i]
