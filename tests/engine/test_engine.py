"""One engine, message by message, where the order of things matters and random interleavings would rarely show it."""

from flowkv.config import EngineConfig
from flowkv.engine.batch import BatchResult, Draw, ItemResult
from flowkv.engine.effects import Send, Write
from flowkv.engine.engine import Engine
from flowkv.messages import (
    Abort,
    Cancel,
    CancelAck,
    Dispatch,
    KvReady,
    LoadReport,
    Message,
    PeerInfo,
    PeerUp,
    Refused,
    Renew,
    Renewed,
    Reserve,
    Reserved,
)
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.types import Request, Role, SamplingParams
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
    engine.handle(Dispatch(1, make_request("r", 24), 0, "f", ["peer"]), 0.0)
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
    engine.handle(Dispatch(1, make_request("r", 8), 0, "f", []), 0.0)
    batch = engine.next_batch(0.0)
    assert batch is not None
    engine.handle(Abort("r"), 0.0)
    assert engine.blocks.num_free == 6
    engine.on_result(BatchResult(batch.batch_id, [ItemResult([Draw(9)])]), 0.01, 0.0)
    assert engine.blocks.num_free == 8
    assert engine.is_idle


def test_a_standstill_takes_back_the_youngest_reservation_and_only_one() -> None:
    engine = make_engine()
    for attempt, request_id in ((1, "old"), (2, "young")):
        engine.handle(Reserve("peer", attempt, make_request(request_id, 8), 0, "f"), 0.0)
    engine.handle(Dispatch(1, make_request("mine", 24), 0, "f", []), 0.0)
    engine.take_effects()
    assert engine.next_batch(0.0) is None
    assert engine.next_batch(0.0) is None
    sent = [effect for effect in engine.take_effects() if isinstance(effect, Send)]
    assert sent == [Send("peer", Cancel("me", "young", 2))]


def test_those_who_wait_here_come_before_newcomers_from_elsewhere() -> None:
    engine = make_engine(num_blocks=10)
    engine.handle(Reserve("peer", 1, make_request("held", 16), 0, "f"), 0.0)
    engine.handle(Dispatch(1, make_request("mine", 28), 0, "f", []), 0.0)  # seven blocks, six are free
    assert engine.next_batch(0.0) is None
    engine.take_effects()
    engine.handle(Reserve("peer", 2, make_request("newcomer", 8), 0, "f"), 0.0)
    sent = [effect.message for effect in engine.take_effects() if isinstance(effect, Send)]
    assert sent == [Refused("me", "newcomer", 2)]


def test_a_report_follows_the_end_of_a_request_at_once_and_echoes_its_dispatch() -> None:
    engine = make_engine()
    engine.handle(Dispatch(41, make_request("r", 4, max_tokens=1), 0, "f", []), 0.0)
    engine.take_effects()
    step(engine)
    reports = [e.message for e in engine.take_effects() if isinstance(e, Send) and isinstance(e.message, LoadReport)]
    assert [(report.sequence, report.finished) for report in reports] == [(41, ["r"])]
    assert reports[0].load.free_blocks == 8
    assert [(s.prefill_tokens, s.decode_choices) for s in reports[0].steps] == [(4, 0)]


def test_a_lease_that_runs_out_is_reported_and_so_are_the_blocks_in_quarantine() -> None:
    engine = make_engine()
    engine.handle(Reserve("peer", 1, make_request("r", 8), 0, "f"), 0.0)
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
    engine.handle(Reserve("peer", 1, make_request("r", 8), 0, "f"), 0.0)
    engine.on_arrived(Arrived(1, 2), 0.0)
    engine.handle(KvReady("peer", "r", 1, 2, {0: [9]}), 0.0)
    assert last_report(engine).handed_over == [("r", "me")]


def test_what_a_silent_instance_may_own_is_reported_until_it_is_heard() -> None:
    engine = make_engine()
    engine.handle(Dispatch(1, make_request("r", 8), 0, "f", ["peer"]), 0.0)
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
    engine.handle(Dispatch(1, make_request("r", 8), 0, "f", []), 0.0)
    step(engine, seconds=10 * LEASE_S)
    engine.handle(Renew("peer", []), 0.0)
    assert Renewed("me", 40 * LEASE_S) in sent_to(engine, "peer")
