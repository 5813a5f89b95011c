"""How a prefilled request moves from this instance (`HandoffSender`) to that one (`handoff_receiver`).

    P                                    D
    Reserve (first chunk)  ---------->   allocate                      RESERVED
    FILLING                <----------   Reserved | Refused
    runs of each chunk     ==========>   count blocks                  FILLING
    KvReady (posted all)   ---------->   wait for the count
    free blocks            <----------   Release, start decoding       READY

Every block has one owner. P's blocks are P's until `Release`. D's blocks are nobody's to reuse from `Reserved` until
D owns the request, or P has said `CancelAck` (its writes have drained), or P is known to be dead. Either side may give
up at any time: D by `Cancel`, P by going straight to `CancelAck`.

Both sides are pure: messages go out through the `send` they are given, by the peer's name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from flowkv.engine.effects import Write
from flowkv.engine.links import Links
from flowkv.engine.sequence import Sequence
from flowkv.messages import Cancel, CancelAck, KvReady, Message, Refused, Release, Reserve, Reserved
from flowkv.transfer.base import Written
from flowkv.transfer.plan import plan_runs

SendTo = Callable[[str, Message], None]  # (instance name, message)


@dataclass(slots=True, eq=False)
class Transfer:
    """One attempt to fill one peer's blocks."""

    request_id: str
    attempt: int
    peer: str
    immediate: int = 0
    dst_blocks: list[int] | None = None  # None until `Reserved`
    num_sent_blocks: int = 0
    in_flight: set[int] = field(default_factory=set)  # tickets
    is_closing: bool = False  # given up: `CancelAck` follows when nothing is in flight
    is_announced: bool = False  # `KvReady` is out


@dataclass(slots=True, eq=False)
class Outgoing:
    """A request that this instance prefills for another to decode."""

    sequence: Sequence
    candidates: list[str]  # not asked yet
    transfer: Transfer | None = None
    choices: dict[int, list[int]] | None = None  # output ids of the choices that run on; None until prefilled
    prefilled_s: float = 0.0


@dataclass(slots=True)
class TransferCounters:
    num_bytes: int = 0
    num_calls: int = 0
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    num_transfers: int = 0
    num_fallbacks: int = 0


class HandoffSender:
    """P's side. `decode_here(sequence, choices)` is called when no peer takes a prefilled request."""

    def __init__(
        self,
        name: str,
        block_size: int,
        send: SendTo,
        write: Callable[[Write], None],
        decode_here: Callable[[Sequence, dict[int, list[int]]], None],
    ) -> None:
        self._name = name
        self._block_size = block_size
        self._send = send
        self._write = write
        self._decode_here = decode_here
        self._outgoing: dict[str, Outgoing] = {}
        self._transfers: dict[int, Transfer] = {}  # by attempt
        self._by_ticket: dict[int, tuple[Transfer, Outgoing]] = {}
        self._num_in_flight: dict[str, int] = {}  # writes, by request
        self._attempts = count(1)
        self._tickets = count(1)
        self.links = Links()
        self.counters = TransferCounters()

    @property
    def num_sending(self) -> int:
        """Requests prefilled here whose blocks wait for the peer to have them."""
        return sum(outgoing.choices is not None for outgoing in self._outgoing.values())

    @property
    def sending(self) -> list[Sequence]:
        return [outgoing.sequence for outgoing in self._outgoing.values() if outgoing.choices is not None]

    @property
    def is_idle(self) -> bool:
        return not (self._outgoing or self._transfers or self._by_ticket)

    def is_pinned(self, sequence: Sequence) -> bool:
        """Its blocks are being read."""
        return sequence.request.request_id in self._num_in_flight

    def expect(self, sequence: Sequence, candidates: list[str]) -> None:
        """This sequence is to be decoded by the first of `candidates` that has room."""
        self._outgoing[sequence.request.request_id] = Outgoing(sequence, candidates)

    def start(self, sequence: Sequence) -> None:
        """Its first chunk is about to be computed: ask for blocks. Nothing if that was done already."""
        outgoing = self._outgoing.get(sequence.request.request_id)
        if outgoing is not None and outgoing.transfer is None:
            self._reserve_next(outgoing)

    def chunk_computed(self, sequence: Sequence) -> None:
        """More of its KV is in the pool: send the blocks that are full."""
        outgoing = self._outgoing.get(sequence.request.request_id)
        if outgoing is not None:
            self._advance(outgoing)

    def takes(self, sequence: Sequence, choices: dict[int, list[int]], now_s: float) -> bool:
        """Its prompt is computed and its first tokens are out. True if another instance is to go on with `choices`."""
        outgoing = self._outgoing.get(sequence.request.request_id)
        if outgoing is None:
            return False
        outgoing.choices, outgoing.prefilled_s = choices, now_s
        if not choices:
            self.give_up(sequence.request.request_id)
            return False
        if outgoing.transfer is None:
            return self._fall_back(outgoing)
        self._advance(outgoing)
        return True

    def give_up(self, request_id: str) -> Sequence | None:
        """Forget a request (aborted, or finished with its first token). Its sequence, if it was held here."""
        outgoing = self._outgoing.pop(request_id, None)
        if outgoing is None:
            return None
        if outgoing.transfer is not None:
            self._close(outgoing.transfer)
        return outgoing.sequence if outgoing.choices is not None else None

    def drop_choice(self, request_id: str, choice: int) -> Sequence | None:
        """Forget one choice; the sequence, if it was the last one held here."""
        outgoing = self._outgoing.get(request_id)
        if outgoing is None:
            return None
        if outgoing.sequence.request.sampling.n == 1:
            return self.give_up(request_id)
        if not outgoing.choices or outgoing.transfer is None or outgoing.transfer.is_announced:
            return None  # nothing is out yet, or the peer, who hears of it too, has the say
        outgoing.choices.pop(choice, None)
        return None if outgoing.choices else self.give_up(request_id)

    def on_reserved(self, message: Reserved) -> None:
        transfer = self._transfers.get(message.attempt)
        if transfer is None or transfer.is_closing or transfer.dst_blocks is not None:
            return
        transfer.dst_blocks, transfer.immediate = message.block_ids, message.immediate
        self._advance(self._outgoing[message.request_id])

    def on_refused(self, message: Refused) -> None:
        if (transfer := self._transfers.pop(message.attempt, None)) is not None and not transfer.is_closing:
            self._reserve_next(self._outgoing[message.request_id])

    def on_cancel(self, message: Cancel) -> None:
        """D takes the reservation back; another one may have room."""
        transfer = self._transfers.get(message.attempt)
        if transfer is None or transfer.is_closing:
            return
        self._close(transfer)
        self._reserve_next(self._outgoing[message.request_id])

    def on_release(self, message: Release) -> Sequence | None:
        """D owns the request now. The sequence whose blocks are free to go."""
        transfer = self._transfers.get(message.attempt)
        if transfer is None or transfer.is_closing:
            return None
        self.counters.num_transfers += 1
        if transfer.in_flight:
            transfer.is_closing = True  # D counted every block: what is missing is only our own completion
        else:
            del self._transfers[message.attempt]
        return self._outgoing.pop(message.request_id).sequence

    def on_written(self, written: Written) -> None:
        transfer, outgoing = self._by_ticket.pop(written.ticket)
        transfer.in_flight.remove(written.ticket)
        remaining = self._num_in_flight.pop(transfer.request_id) - 1
        if remaining:
            self._num_in_flight[transfer.request_id] = remaining
        self.links.count(transfer.peer, written.num_bytes, 0, written.seconds)
        self.counters.num_bytes += written.num_bytes
        self.counters.seconds += written.seconds
        if outgoing.choices is not None:
            after_prefill_s = max(0.0, written.finished_s - outgoing.prefilled_s)
            self.counters.exposed_seconds += min(written.seconds, after_prefill_s)
        if transfer.is_closing and not transfer.in_flight:
            self._acknowledge(transfer)

    def on_peer_down(self, peer: str) -> None:
        """What it had not taken over goes elsewhere; the KV is still here."""
        self.links.down(peer)
        for transfer in [t for t in self._transfers.values() if t.peer == peer]:
            was_closing, transfer.is_closing = transfer.is_closing, True
            if not transfer.in_flight:
                del self._transfers[transfer.attempt]
            if not was_closing:
                self._reserve_next(self._outgoing[transfer.request_id])

    def _reserve_next(self, outgoing: Outgoing) -> None:
        outgoing.transfer = None
        while outgoing.candidates and not self.links.is_up(outgoing.candidates[0]):
            outgoing.candidates.pop(0)
        if not outgoing.candidates:
            if outgoing.choices is not None:
                self._fall_back(outgoing)
            return
        sequence = outgoing.sequence
        transfer = Transfer(sequence.request.request_id, next(self._attempts), outgoing.candidates.pop(0))
        self._transfers[transfer.attempt] = outgoing.transfer = transfer
        reserve = Reserve(
            self._name, transfer.attempt, sequence.request, sequence.attempt, sequence.frontend_address
        )  # fmt: skip
        self._send(transfer.peer, reserve)

    def _advance(self, outgoing: Outgoing) -> None:
        """Post the runs of every block that is finished and not yet sent; announce when that was all."""
        transfer = outgoing.transfer
        if transfer is None or transfer.dst_blocks is None:
            return
        sequence = outgoing.sequence
        is_prefilled = outgoing.choices is not None
        done = len(transfer.dst_blocks) if is_prefilled else sequence.num_computed // self._block_size
        if done > transfer.num_sent_blocks:
            part = slice(transfer.num_sent_blocks, done)
            runs = plan_runs(sequence.block_table[part], transfer.dst_blocks[part])
            transfer.num_sent_blocks = done
            self.counters.num_calls += len(runs)
            self.links.count(transfer.peer, 0, len(runs), 0.0)
            self._post(Write(next(self._tickets), transfer.peer, runs, transfer.immediate), transfer, outgoing)
        if outgoing.choices is not None and not transfer.is_announced:
            transfer.is_announced = True
            request_id = transfer.request_id
            self._send(
                transfer.peer,
                KvReady(self._name, request_id, transfer.attempt, len(transfer.dst_blocks), outgoing.choices),
            )

    def _post(self, write: Write, transfer: Transfer, outgoing: Outgoing) -> None:
        transfer.in_flight.add(write.ticket)
        self._by_ticket[write.ticket] = (transfer, outgoing)
        self._num_in_flight[transfer.request_id] = self._num_in_flight.get(transfer.request_id, 0) + 1
        self._write(write)

    def _fall_back(self, outgoing: Outgoing) -> bool:
        assert outgoing.choices is not None
        self.counters.num_fallbacks += 1
        del self._outgoing[outgoing.sequence.request.request_id]
        self._decode_here(outgoing.sequence, outgoing.choices)
        return True

    def _close(self, transfer: Transfer) -> None:
        transfer.is_closing = True
        if not transfer.in_flight:
            self._acknowledge(transfer)

    def _acknowledge(self, transfer: Transfer) -> None:
        """Nothing of a transfer that was given up is in flight any more. Harmless where D has it all already."""
        del self._transfers[transfer.attempt]
        self._send(transfer.peer, CancelAck(self._name, transfer.request_id, transfer.attempt))
