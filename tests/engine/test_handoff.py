"""The protocol seen from one side, message by message; test_cluster_in_process.py has all interleavings of both."""

import msgspec
import pytest

from flowkv.engine.effects import CancelWrite, Effect, Expect, Forget, Write
from flowkv.engine.handoff_receiver import HandoffReceiver, Incoming
from flowkv.engine.handoff_sender import HandoffSender
from flowkv.engine.leases import LeaseClock
from flowkv.engine.sequence import Sequence
from flowkv.errors import ProtocolError
from flowkv.kv.blocks import BlockManager
from flowkv.messages import (
    Cancel,
    CancelAck,
    KvReady,
    Message,
    Refused,
    Release,
    Renew,
    Renewed,
    Reserve,
    Reserved,
)
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.transfer.plan import Run
from flowkv.types import Request, SamplingParams

BLOCK_SIZE = 4
LEASE_S = 3.0
BEAT_S = 1.0
READY = KvReady("p", "r", 1, 3, {0: [9]})
REQUEST = Request(request_id="r", prompt_ids=[1] * 10, sampling=SamplingParams(max_tokens=8))


class P:
    """A sender with one request of three blocks; what it does is recorded."""

    def __init__(self, candidates: list[str]) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.writes: list[Write] = []
        self.decoded_here: list[dict[int, list[int]]] = []
        self.cancelled: list[int] = []  # tickets
        self.sender = HandoffSender(
            "p",
            BLOCK_SIZE,
            LeaseClock(LEASE_S),
            lambda name, message: self.sent.append((name, message)),
            self._emit,
            lambda sequence, choices: self.decoded_here.append(choices),
        )
        for name in ("d0", "d1"):
            self.sender.links.up(Linked(name, "local"))
        self.sequence = Sequence(REQUEST, "f", 0, block_table=[4, 5, 6])
        self.sender.expect(self.sequence, candidates)
        self.sender.start(self.sequence)

    def _emit(self, effect: Effect) -> None:
        if isinstance(effect, Write):
            self.writes.append(effect)
        else:
            assert isinstance(effect, CancelWrite)
            self.cancelled.append(effect.ticket)

    def compute(self, num_tokens: int) -> None:
        self.sequence.num_computed = num_tokens
        self.sender.chunk_computed(self.sequence)

    def finish(self) -> bool:
        self.sequence.num_computed = 10
        return self.sender.takes(self.sequence, {0: [9]}, 1.0)

    def written(self, write: Write, error: str | None = None) -> None:
        self.sender.on_written(Written(write.ticket, 1, 0.1, 1.0, error))

    def announce(self) -> None:
        """Reserved by d0 in its first attempt, all written, and `KvReady` is out."""
        self.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
        assert self.finish() and self.sent[-1][1] == READY
        self.written(self.writes[0])
        self.sent.clear()

    def tick(self, beats: int = 1) -> list[tuple[str, Message]]:
        """What is said in that time."""
        self.sent.clear()
        for _ in range(beats):
            self.sender.tick(BEAT_S)
        return list(self.sent)


def test_finished_chunks_are_sent_while_the_next_is_computed() -> None:
    p = P(["d0"])
    assert isinstance(p.sent[0][1], Reserve) and p.sent[0][0] == "d0"
    p.compute(4)
    assert p.writes == []  # no blocks on the other side yet
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    assert p.writes[0].runs == [Run(4, 0, 1)]
    p.compute(8)
    assert p.writes[1].runs == [Run(5, 1, 1)]
    assert p.finish()
    assert p.writes[2].runs == [Run(6, 2, 1)]  # the last block is sent although it is not full
    assert {write.immediate for write in p.writes} == {77}
    assert p.sent[-1] == ("d0", KvReady("p", "r", 1, 3, {0: [9]}))
    for write in p.writes:
        p.written(write)
    assert p.sender.on_release(Release("d0", "r", 1)) is p.sequence
    assert p.sender.is_idle


def test_only_copying_after_the_last_chunk_is_exposed() -> None:
    p = P(["d0"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.compute(8)
    p.sender.on_written(Written(p.writes[0].ticket, 100, seconds=0.3, finished_s=0.9))
    p.finish()  # at 1.0 s
    p.sender.on_written(Written(p.writes[1].ticket, 50, seconds=0.2, finished_s=1.1))
    assert p.sender.counters.seconds == pytest.approx(0.5)
    assert p.sender.counters.exposed_seconds == pytest.approx(0.1)
    assert (p.sender.counters.num_bytes, p.sender.counters.num_calls) == (150, 2)


def test_refused_by_one_it_asks_the_next_and_then_decodes_here() -> None:
    p = P(["d0", "d1"])
    p.sender.on_refused(Refused("d0", "r", 1))
    assert [name for name, _ in p.sent] == ["d0", "d1"]
    assert p.finish()
    assert p.decoded_here == []  # d1 has not answered
    p.sender.on_refused(Refused("d1", "r", 2))
    assert p.decoded_here == [{0: [9]}]
    assert p.sender.is_idle


def test_what_another_peer_says_of_a_transfer_or_of_another_request_changes_nothing() -> None:
    p = P(["d0"])
    for instance, request_id in (("d1", "r"), ("d0", "other")):
        p.sender.on_refused(Refused(instance, request_id, 1))
        p.sender.on_reserved(Reserved(instance, request_id, 1, 7, [0, 1, 2]))
    p.announce()
    for instance, request_id in (("d1", "r"), ("d0", "other")):
        p.sender.on_cancel(Cancel(instance, request_id, 1))
        assert p.sender.on_release(Release(instance, request_id, 1)) is None
    assert p.sender.on_release(Release("d0", "r", 1)) is p.sequence


def test_a_reservation_of_another_size_is_no_reservation() -> None:
    p = P(["d0"])
    with pytest.raises(ProtocolError, match="2 blocks, not 3"):
        p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1]))
    p.announce()


def test_what_was_sent_survives_preemption() -> None:
    p = P(["d0"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 1, [0, 1, 2]))
    p.compute(8)
    p.written(p.writes[0])
    p.sequence.num_computed, p.sequence.block_table = 0, [1, 2, 3]
    p.sender.start(p.sequence)
    p.compute(4)
    assert len(p.writes) == 1 and len(p.sent) == 1
    p.finish()
    assert p.writes[1].runs == [Run(3, 2, 1)]


def test_cancelled_it_acknowledges_only_when_its_writes_have_drained() -> None:
    p = P(["d0", "d1"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 1, [0, 1, 2]))
    p.compute(8)
    p.sender.on_cancel(Cancel("d0", "r", 1))
    assert p.sender.is_pinned(p.sequence)
    assert [type(m).__name__ for _, m in p.sent] == ["Reserve", "Reserve"]
    p.written(p.writes[0])
    assert p.sent[-1] == ("d0", CancelAck("p", "r", 1))
    assert not p.sender.is_pinned(p.sequence)


def test_an_abort_before_the_answer_still_ends_the_reservation() -> None:
    p = P(["d0"])
    p.sender.give_up("r")
    assert p.sent[-1] == ("d0", CancelAck("p", "r", 1))
    p.sender.on_reserved(Reserved("d0", "r", 1, 1, [0, 1, 2]))  # was on its way
    assert p.writes == [] and p.sender.is_idle


def test_a_dead_peer_is_left_for_the_next_one_and_everything_is_sent_again() -> None:
    p = P(["d0", "d1"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 1, [0, 1, 2]))
    p.finish()
    p.sender.on_peer_down("d0")
    p.sender.on_reserved(Reserved("d1", "r", 2, 5, [7, 8, 9]))
    assert p.writes[-1].runs == [Run(4, 7, 3)] and p.writes[-1].peer == "d1"
    assert p.sent[-1] == ("d1", KvReady("p", "r", 2, 3, {0: [9]}))


def test_a_peer_that_is_not_reachable_is_not_asked() -> None:
    p = P(["gone", "d1"])
    assert [name for name, _ in p.sent] == ["d1"]


def test_reserve_is_repeated_until_it_is_answered() -> None:
    p = P(["d0"])
    [reserve] = p.sent
    assert p.tick() == [("d0", Renew("p", [1], LEASE_S)), reserve]
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    assert p.tick() == [("d0", Renew("p", [1], LEASE_S))]


@pytest.mark.parametrize("answer", [Release("d0", "r", 1), Cancel("d0", "r", 1)])
def test_ready_is_repeated_until_it_is_answered(answer: Release | Cancel) -> None:
    p = P(["d0"])
    p.announce()
    assert p.tick() == [("d0", Renew("p", [1], LEASE_S)), ("d0", READY)]
    if isinstance(answer, Release):
        p.sender.on_release(answer)
        assert p.sender.is_idle and p.decoded_here == []
    else:
        p.sender.on_cancel(answer)
        assert p.decoded_here == [{0: [9]}] and p.sender.is_idle
    assert p.tick() == []


def test_doubled_answers_change_nothing() -> None:
    p = P(["d0", "d1"])
    for _ in range(2):
        p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.sender.on_refused(Refused("d0", "r", 1))
    p.compute(8)
    assert len(p.writes) == 1
    for _ in range(2):
        p.sender.on_cancel(Cancel("d0", "r", 1))
    assert [name for name, message in p.sent if isinstance(message, Reserve)] == ["d0", "d1"]
    p.sender.on_reserved(Reserved("d1", "r", 2, 5, [7, 8, 9]))
    p.finish()
    assert p.sender.on_release(Release("d1", "r", 2)) is p.sequence
    assert p.sender.on_release(Release("d1", "r", 2)) is None
    p.sender.on_refused(Refused("d1", "r", 2))
    assert p.decoded_here == [] and p.sender.counters.num_transfers == 1


@pytest.mark.parametrize("message", [Reserved("d0", "x", 9, 1, [0]), Cancel("d0", "x", 9)])
def test_what_it_does_not_know_it_will_never_write_for(message: Reserved | Cancel) -> None:
    p = P([])
    p.sender.on_reserved(message) if isinstance(message, Reserved) else p.sender.on_cancel(message)
    assert p.sent == [("d0", CancelAck("p", "x", 9))]


def test_one_that_is_draining_is_not_acknowledged_when_asked_again() -> None:
    p = P(["d0"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.compute(8)
    p.sender.give_up("r")
    p.sent.clear()
    p.sender.on_cancel(Cancel("d0", "r", 1))
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    assert p.sent == []
    p.written(p.writes[0])
    assert p.sent == [("d0", CancelAck("p", "r", 1))]


def test_what_was_never_announced_cannot_be_released() -> None:
    p = P(["d0"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    assert p.sender.on_release(Release("d0", "r", 1)) is None
    assert p.finish() and p.sent[-1] == ("d0", READY)


@pytest.mark.parametrize("how", ["abort", "cancel"])
def test_what_is_given_up_is_not_written_if_it_can_be_helped(how: str) -> None:
    p = P(["d0"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.compute(4)
    p.compute(8)
    if how == "abort":
        p.sender.give_up("r")
    else:
        p.sender.on_cancel(Cancel("d0", "r", 1))
    assert p.cancelled == [write.ticket for write in p.writes]


def test_what_is_released_is_not_cancelled() -> None:
    p = P(["d0"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.finish()
    assert p.sender.on_release(Release("d0", "r", 1)) is p.sequence
    assert p.cancelled == [] and p.sender.is_pinned(p.sequence)
    p.written(p.writes[0])
    assert p.sender.is_idle


def test_a_write_that_fails_sends_the_request_elsewhere() -> None:
    p = P(["d0", "d1"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.compute(4)
    p.compute(8)
    p.written(p.writes[0], "the link broke")
    assert p.cancelled == [p.writes[1].ticket]
    assert [(name, type(m)) for name, m in p.sent] == [("d0", Reserve), ("d1", Reserve)]
    p.written(p.writes[1])
    assert p.sent[-1] == ("d0", CancelAck("p", "r", 1))


def test_a_write_that_fails_after_ready_leaves_the_word_to_the_peer() -> None:
    p = P(["d0", "d1"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.finish()
    p.written(p.writes[0], "the link broke")
    assert p.tick() == [("d0", Renew("p", [], LEASE_S)), ("d0", READY)]  # its lease runs out, unless it was adopted
    p.sender.on_cancel(Cancel("d0", "r", 1))
    assert [type(m) for _, m in p.sent[-2:]] == [CancelAck, Reserve]


def test_what_has_nothing_left_to_write_and_is_not_released_is_not_renewed_for_ever() -> None:
    p = P(["d0"])
    p.announce()
    p.sender.tick(BEAT_S)
    for _ in range(2):
        p.sender.heard("d0")
        assert ("d0", Renew("p", [1], LEASE_S)) in p.tick()
    p.sender.heard("d0")
    assert ("d0", Renew("p", [], LEASE_S)) in p.tick()


def test_a_silent_peer_is_left_after_a_lease() -> None:
    p = P(["d0", "d1"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.compute(4)
    for _ in range(4):
        p.sender.heard("d0")
        p.tick()
    assert p.cancelled == []
    p.tick(2)
    assert p.cancelled == [p.writes[0].ticket]
    assert [(name, type(m)) for name, m in p.sent[-2:]] == [("d0", Renew), ("d1", Reserve)]
    p.written(p.writes[0])
    assert p.sent[-1] == ("d0", CancelAck("p", "r", 1))


def test_a_link_that_moves_nothing_is_left_though_its_peer_answers() -> None:
    p = P(["d0", "d1"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.compute(4)
    p.compute(8)
    for _ in range(5):
        p.sender.heard("d0")
        p.tick()
    p.written(p.writes[0])  # something ends: the link is slow, not dead
    for _ in range(5):
        p.sender.heard("d0")
        p.tick()
    assert p.cancelled == []
    p.sender.heard("d0")
    assert [type(m) for name, m in p.tick() if name == "d1"] == [Reserve]
    assert p.cancelled == [p.writes[1].ticket]
    p.written(p.writes[1])
    assert p.sent[-1] == ("d0", CancelAck("p", "r", 1))


def test_what_a_stuck_link_should_have_brought_is_not_renewed_once_it_is_announced() -> None:
    p = P(["d0"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.finish()
    for _ in range(5):
        p.sender.heard("d0")
        assert ("d0", Renew("p", [1], LEASE_S)) in p.tick()
    for _ in range(2):
        p.sender.heard("d0")
        p.tick()
    assert ("d0", Renew("p", [], LEASE_S)) in p.sent
    assert p.cancelled == []  # D may have it


def test_a_peer_may_be_silent_for_as_long_as_it_says() -> None:
    p = P(["d0"])
    p.tick()
    p.sender.heard("d0", 6 * BEAT_S)
    assert p.finish() and p.tick(5) and p.decoded_here == []
    p.tick()
    assert p.decoded_here == [{0: [9]}]


def test_a_silent_peer_is_not_asked() -> None:
    p = P(["d0"])
    p.announce()
    p.tick(3)
    other = Sequence(msgspec.structs.replace(REQUEST, request_id="other"), "f", 1)
    p.sender.expect(other, ["d0", "d1"])
    p.sent.clear()
    p.sender.start(other)
    assert [name for name, _ in p.sent] == ["d1"]


def test_a_silent_peer_that_may_own_the_request_is_waited_for_and_told_of() -> None:
    p = P(["d0", "d1"])
    p.announce()
    p.tick(2)
    assert p.sender.unanswered == []
    p.tick(2)
    assert p.sender.unanswered == [("r", "d0")]
    assert p.sender.sending == [p.sequence] and p.decoded_here == []
    p.sender.heard("d0")
    assert p.sender.unanswered == []
    assert p.sender.on_release(Release("d0", "r", 1)) is p.sequence


def test_reserve_says_what_is_settled() -> None:
    p = P(["d0", "d1"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 1, [0, 1, 2]))
    p.compute(8)
    p.sender.on_cancel(Cancel("d0", "r", 1))
    reserve = p.sent[-1][1]
    assert isinstance(reserve, Reserve)
    assert (reserve.attempt, reserve.oldest_attempt) == (2, 1)  # what drains may still be written
    p.written(p.writes[0])
    repeated = p.tick()[-1][1]
    assert isinstance(repeated, Reserve)
    assert (repeated.attempt, repeated.oldest_attempt) == (2, 2)


class D:
    def __init__(self, num_blocks: int = 8) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.sent: list[tuple[str, Message]] = []
        self.adopted: list[Incoming] = []
        self.effects: list[Effect | Message] = []
        self.receiver = HandoffReceiver(
            "d", self.blocks, LeaseClock(LEASE_S), self._send, self.effects.append, self.adopted.append
        )

    def _send(self, name: str, message: Message) -> None:
        self.sent.append((name, message))
        self.effects.append(message)

    def adopt(self) -> None:
        reserved = self.reserve()
        assert isinstance(reserved, Reserved)
        self.receiver.on_arrived(Arrived(reserved.immediate, 3))
        self.receiver.on_ready(READY)
        assert len(self.adopted) == 1

    def reserve(self, attempt: int = 1, source: str = "p") -> Message:
        self.receiver.on_reserve(Reserve(source, attempt, REQUEST, "f"), has_room=True)
        return self.sent[-1][1]


@pytest.mark.parametrize("ready_first", [True, False])
def test_it_owns_the_request_when_every_block_is_counted_and_ready_is_there(ready_first: bool) -> None:
    d = D()
    reserved = d.reserve()
    assert isinstance(reserved, Reserved) and len(reserved.block_ids) == 3
    if ready_first:
        d.receiver.on_ready(READY)
    assert d.receiver.may_wait(Arrived(reserved.immediate, 2)) is not ready_first
    d.receiver.on_arrived(Arrived(reserved.immediate, 2))
    assert d.adopted == []
    d.receiver.on_arrived(Arrived(reserved.immediate, 1))
    if not ready_first:
        assert d.adopted == []
        d.receiver.on_ready(READY)
    assert [incoming.choices for incoming in d.adopted] == [{0: [9]}]
    assert d.sent[-1] == ("p", Release("d", "r", 1))


def test_no_room_is_refused() -> None:
    d = D(num_blocks=2)
    assert d.reserve() == Refused("d", "r", 1)
    assert d.blocks.num_free == 2


def test_an_aborted_reservation_is_not_reused_before_the_writer_says_so() -> None:
    d = D()
    reserved = d.reserve()
    assert isinstance(reserved, Reserved)
    d.receiver.abort("r", None)
    assert d.sent[-1] == ("p", Cancel("d", "r", 1))
    d.receiver.on_arrived(Arrived(reserved.immediate, 3))
    d.receiver.on_ready(READY)
    assert d.adopted == [] and d.blocks.num_free == 5
    d.receiver.on_cancel_ack(CancelAck("p", "r", 1))
    assert d.blocks.num_free == 8


def test_a_dead_writer_is_as_good_as_its_word() -> None:
    d = D()
    d.reserve()
    d.reserve(attempt=1, source="q")
    d.receiver.on_peer_down("p")
    assert d.blocks.num_free == 5
    assert [incoming.reserve.source for incoming in d.receiver.incoming] == ["q"]


def test_what_a_network_may_still_carry_of_a_dead_writer_keeps_its_blocks_for_a_lease() -> None:
    d = D()
    reserved = d.reserve()
    assert isinstance(reserved, Reserved)
    d.receiver.on_peer_down("p", may_linger=True)
    d.receiver.on_ready(READY)
    d.receiver.on_arrived(Arrived(reserved.immediate, 3))
    d.sent.clear()
    d.receiver.tick(LEASE_S / 2)
    assert d.blocks.num_free == 5 and d.receiver.num_quarantined_blocks == 3
    d.receiver.tick(LEASE_S / 2)
    assert d.blocks.num_free == 8 and d.receiver.incoming == []
    assert d.adopted == [] and d.sent == []  # there is nobody to ask


def test_what_a_dead_source_had_sent_before_is_ignored() -> None:
    d = D()
    d.receiver.on_peer_down("p")
    d.receiver.on_reserve(Reserve("p", 1, REQUEST, "f"), has_room=True)
    assert d.sent == [] and d.blocks.num_free == 8


def test_a_repeated_reservation_gets_the_same_blocks_and_a_late_one_gets_none() -> None:
    d = D()
    reserved = d.reserve()
    assert d.reserve() == reserved and d.blocks.num_free == 5
    d.receiver.on_cancel_ack(CancelAck("p", "r", 1))
    assert d.reserve() == Refused("d", "r", 1)
    assert d.blocks.num_free == 8


def test_a_reservation_that_comes_after_its_writer_has_given_up_gets_nothing() -> None:
    d = D()
    d.receiver.on_cancel_ack(CancelAck("p", "r", 1))
    assert d.reserve() == Refused("d", "r", 1)
    assert isinstance(d.reserve(attempt=2), Reserved)
    d.receiver.on_cancel_ack(CancelAck("p", "r", 2))
    assert d.blocks.num_free == 8


def test_what_was_refused_stays_refused() -> None:
    d = D()
    d.receiver.on_reserve(Reserve("p", 1, REQUEST, "f"), has_room=False)
    assert d.reserve() == Refused("d", "r", 1)
    assert d.blocks.num_free == 8


def test_who_asks_again_for_what_was_adopted_is_told_again() -> None:
    d = D()
    d.adopt()
    for repeat in (lambda: d.receiver.on_ready(READY), d.reserve):
        d.sent.clear()
        repeat()
        assert d.sent == [("p", Release("d", "r", 1))]
    d.receiver.on_cancel_ack(CancelAck("p", "r", 1))
    assert d.reserve() == Release("d", "r", 1)
    assert len(d.adopted) == 1 and d.blocks.num_free == 5


def test_ready_for_what_is_unknown_or_given_up_is_cancelled_again() -> None:
    d = D()
    d.receiver.on_ready(READY)
    assert d.sent == [("p", Cancel("d", "r", 1))]
    d.reserve()
    d.receiver.abort("r", None)
    for repeat in (lambda: d.receiver.on_ready(READY), d.reserve):
        d.sent.clear()
        repeat()
        assert d.sent == [("p", Cancel("d", "r", 1))]
    assert d.blocks.num_free == 5


def test_what_the_source_has_settled_is_forgotten_and_late_messages_for_it_meet_nothing() -> None:
    d = D()
    d.adopt()
    d.receiver.on_reserve(Reserve("p", 5, REQUEST, "f", oldest_attempt=5), has_room=False)
    d.sent.clear()
    d.receiver.on_reserve(Reserve("p", 1, REQUEST, "f"), has_room=True)
    d.receiver.on_ready(READY)
    assert d.sent == [] and d.blocks.num_free == 5
    assert d.reserve(attempt=5) == Refused("d", "r", 5)  # the oldest that is open is not settled


def test_a_source_that_does_not_renew_loses_its_reservation_to_quarantine() -> None:
    d = D()
    d.reserve()
    d.reserve(attempt=2)
    for _ in range(2):
        d.receiver.tick(BEAT_S)
        d.receiver.on_renew(Renew("p", [2]))
        assert d.sent[-1] == ("p", Renewed("d", LEASE_S))
    assert d.receiver.num_expired == 0
    d.receiver.tick(BEAT_S)
    assert [i.is_cancelled for i in d.receiver.incoming] == [True, False]
    assert d.sent[-1] == ("p", Cancel("d", "r", 1))
    assert (d.receiver.num_expired, d.receiver.num_quarantined_blocks, d.blocks.num_free) == (1, 3, 2)
    d.receiver.on_peer_down("p")
    assert (d.receiver.num_quarantined_blocks, d.blocks.num_free) == (0, 8)


def test_blocks_that_arrive_renew_too_and_who_asked_for_a_longer_lease_has_it() -> None:
    d = D()
    reserved = d.reserve()
    d.receiver.on_reserve(Reserve("q", 1, REQUEST, "f", lease_s=5 * BEAT_S), has_room=True)
    assert isinstance(reserved, Reserved)
    for _ in range(4):
        d.receiver.on_arrived(Arrived(reserved.immediate, 0))
        d.receiver.tick(BEAT_S)
    assert d.receiver.num_expired == 0
    d.receiver.tick(BEAT_S)
    assert [i.is_cancelled for i in d.receiver.incoming] == [False, True]


def test_cancel_is_repeated_until_it_is_acknowledged() -> None:
    d = D()
    d.reserve()
    d.receiver.abort("r", None)
    for _ in range(3):
        d.receiver.tick(BEAT_S)
    assert [message for _, message in d.sent[1:]] == [Cancel("d", "r", 1)] * 4
    d.receiver.on_cancel_ack(CancelAck("p", "r", 1))
    d.receiver.tick(BEAT_S)
    assert len(d.sent) == 5


def test_the_count_is_expected_before_the_writer_knows_and_until_the_blocks_are_somebodys() -> None:
    d = D()
    reserved = d.reserve()
    assert isinstance(reserved, Reserved)
    assert d.effects == [Expect(reserved.immediate), reserved]
    d.reserve()
    d.receiver.abort("r", None)
    assert Forget(reserved.immediate) not in d.effects
    d.receiver.on_cancel_ack(CancelAck("p", "r", 1))
    assert d.effects[-1] == Forget(reserved.immediate)
    other = D()
    other.adopt()
    assert sum(isinstance(effect, Forget) for effect in other.effects) == 1


def test_to_break_a_standstill_it_does_not_wait_for_those_who_are_silent() -> None:
    d = D()
    d.reserve()
    d.reserve(source="q")
    d.receiver.revoke_youngest()
    d.receiver.revoke_youngest()
    assert [i.is_cancelled for i in d.receiver.incoming] == [False, True]
    for _ in range(3):
        d.receiver.on_renew(Renew("p", [1]))
        d.receiver.tick(BEAT_S)
    d.receiver.revoke_youngest()
    assert [i.is_cancelled for i in d.receiver.incoming] == [True, True]


def test_blocks_in_quarantine_hold_no_choices() -> None:
    d = D()
    d.reserve()
    assert d.receiver.num_choices == 1
    d.receiver.abort("r", None)
    assert d.receiver.num_choices == 0 and d.receiver.num_reserved_blocks == 3


def test_what_was_given_up_is_not_adopted_though_all_of_it_comes() -> None:
    d = D()
    reserved = d.reserve()
    assert isinstance(reserved, Reserved)
    d.receiver.on_ready(READY)
    d.receiver.abort("r", None)
    d.receiver.on_arrived(Arrived(reserved.immediate, 3))
    assert d.adopted == [] and d.blocks.num_free == 5


def test_a_reservation_that_is_asked_for_again_begins_its_lease_anew() -> None:
    d = D()
    for _ in range(4):
        d.reserve()
        d.receiver.tick(BEAT_S)
    assert d.receiver.num_expired == 0


def test_a_dropped_choice_is_not_taken_over() -> None:
    d = D()
    reserved = d.reserve()
    assert isinstance(reserved, Reserved)
    d.receiver.abort("r", 1)
    d.receiver.on_arrived(Arrived(reserved.immediate, 3))
    d.receiver.on_ready(KvReady("p", "r", 1, 3, {0: [9], 1: [8]}))
    assert d.adopted[0].choices == {0: [9]}


def test_a_write_that_fails_is_tried_once_more_with_the_same_peer_and_then_decoded_here() -> None:
    p = P(["d0"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.compute(4)
    p.written(p.writes[0], "the link broke")
    assert ("d0", CancelAck("p", "r", 1)) in p.sent
    again = p.sent[-1][1]
    assert isinstance(again, Reserve) and again.attempt == 2
    p.sender.on_reserved(Reserved("d0", "r", 2, 78, [3, 4, 5]))
    assert p.writes[1].runs == [Run(4, 3, 1)]
    p.written(p.writes[1], "the link broke")
    assert p.finish() and p.decoded_here == [{0: [9]}]


def test_others_are_asked_before_the_one_to_which_a_write_failed() -> None:
    p = P(["d0", "d1"])
    p.sender.on_reserved(Reserved("d0", "r", 1, 77, [0, 1, 2]))
    p.compute(4)
    p.written(p.writes[0], "the link broke")
    assert p.sent[-1][0] == "d1"
    p.sender.on_refused(Refused("d1", "r", 2))
    assert p.sent[-1][0] == "d0" and isinstance(p.sent[-1][1], Reserve)
