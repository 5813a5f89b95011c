"""The protocol seen from one side, message by message; test_cluster_in_process.py has all interleavings of both."""

import pytest

from flowkv.engine.effects import Write
from flowkv.engine.handoff_receiver import HandoffReceiver, Incoming
from flowkv.engine.handoff_sender import HandoffSender
from flowkv.engine.sequence import Sequence
from flowkv.kv.blocks import BlockManager
from flowkv.messages import (
    Cancel,
    CancelAck,
    KvReady,
    Message,
    Refused,
    Release,
    Reserve,
    Reserved,
)
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.transfer.plan import Run
from flowkv.types import Request, SamplingParams

BLOCK_SIZE = 4
REQUEST = Request(request_id="r", prompt_ids=[1] * 10, sampling=SamplingParams(max_tokens=8))


class P:
    """A sender with one request of three blocks; what it does is recorded."""

    def __init__(self, candidates: list[str]) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.writes: list[Write] = []
        self.decoded_here: list[dict[int, list[int]]] = []
        self.sender = HandoffSender(
            "p",
            BLOCK_SIZE,
            lambda name, message: self.sent.append((name, message)),
            self.writes.append,
            lambda sequence, choices: self.decoded_here.append(choices),
        )
        for name in ("d0", "d1"):
            self.sender.links.up(Linked(name, "local"))
        self.sequence = Sequence(REQUEST, 0, "f", 0, block_table=[4, 5, 6])
        self.sender.expect(self.sequence, candidates)
        self.sender.start(self.sequence)

    def compute(self, num_tokens: int) -> None:
        self.sequence.num_computed = num_tokens
        self.sender.chunk_computed(self.sequence)

    def finish(self) -> bool:
        self.sequence.num_computed = 10
        return self.sender.takes(self.sequence, {0: [9]}, 1.0)

    def written(self, write: Write) -> None:
        self.sender.on_written(Written(write.ticket, 1, 0.1, 1.0))


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


class D:
    def __init__(self, num_blocks: int = 8) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.sent: list[tuple[str, Message]] = []
        self.adopted: list[Incoming] = []
        self.receiver = HandoffReceiver(
            "d", self.blocks, lambda name, message: self.sent.append((name, message)), self.adopted.append
        )

    def reserve(self, attempt: int = 1, source: str = "p") -> Message:
        self.receiver.on_reserve(Reserve(source, attempt, REQUEST, 0, "f"), has_room=True)
        return self.sent[-1][1]


READY = KvReady("p", "r", 1, 3, {0: [9]})


@pytest.mark.parametrize("ready_first", [True, False])
def test_it_owns_the_request_when_every_block_is_counted_and_ready_is_there(ready_first: bool) -> None:
    d = D()
    reserved = d.reserve()
    assert isinstance(reserved, Reserved) and len(reserved.block_ids) == 3
    if ready_first:
        d.receiver.on_ready(READY)
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


def test_what_a_dead_source_had_sent_before_is_ignored() -> None:
    d = D()
    d.receiver.on_peer_down("p")
    d.receiver.on_reserve(Reserve("p", 1, REQUEST, 0, "f"), has_room=True)
    assert d.sent == [] and d.blocks.num_free == 8


def test_an_echo_of_a_reservation_is_ignored() -> None:
    d = D()
    d.reserve()
    d.reserve()
    d.receiver.on_cancel_ack(CancelAck("p", "r", 1))
    d.reserve()
    assert d.blocks.num_free == 8 and len(d.sent) == 1


def test_a_dropped_choice_is_not_taken_over() -> None:
    d = D()
    reserved = d.reserve()
    assert isinstance(reserved, Reserved)
    d.receiver.abort("r", 1)
    d.receiver.on_arrived(Arrived(reserved.immediate, 3))
    d.receiver.on_ready(KvReady("p", "r", 1, 3, {0: [9], 1: [8]}))
    assert d.adopted[0].choices == {0: [9]}
