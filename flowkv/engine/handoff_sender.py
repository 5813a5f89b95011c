"""How a prefilled request moves from this instance (`HandoffSender`) to that one (`handoff_receiver`).

    P                                    D
    Reserve (first chunk)  ---------->   allocate                      RESERVED
    FILLING                <----------   Reserved | Refused
    runs of each chunk     ==========>   count blocks                  FILLING
    KvReady (posted all)   ---------->   wait for the count
    free blocks            <----------   Release, start decoding       READY

Every block has one owner. P's blocks are P's until `Release`. D's blocks are nobody's to reuse from `Reserved` until
D owns the request, or P has said `CancelAck` (its writes have drained), or P is known to be dead (over a network: and a
lease has passed, for what that still carries). Either side may give up at any time: D by `Cancel`, P by going straight
to `CancelAck`. But once `KvReady` is out D may own the request, so P goes elsewhere only after `Cancel` or D's death;
if D is silent P says so to the controller, who ends the request.

Messages may be lost, doubled or late. A beat is a third of a lease (`leases`).

    repeated every beat    until                   answered again, from memory if need be, with
    Reserve                Reserved | Refused      Reserved; Release if adopted, else Refused
    KvReady                Release | Cancel        Release if adopted; Cancel if given up or unknown
    Cancel                 CancelAck               CancelAck, also for what P does not know (any more)
    Renew (one a peer)     nothing is open         Renewed

`Renew` names the transfers that P still wants. One that is not renewed for a lease is quarantined by D: `Cancel` goes
out, the blocks stay untouched. P renews no transfer of which a write has failed, and none that has waited for its
`Release` for a lease with nothing left to write: D then says what is true of it, Release or Cancel. P leaves a D that
has answered nothing for a lease, or to which no write has ended for two, unless `KvReady` is out.

Both sides are pure: messages go out through the `send` they are given, by the peer's name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flowkv.engine.effects import Effect
from flowkv.engine.leases import LeaseClock, Watches
from flowkv.engine.links import Links
from flowkv.engine.sequence import Sequence
from flowkv.engine.transfers import SendTo, Transfer, Transfers
from flowkv.errors import ProtocolError
from flowkv.messages import Cancel, CancelAck, KvReady, Refused, Release, Renew, Reserve, Reserved
from flowkv.transfer.base import Written
from flowkv.transfer.plan import plan_runs

_STUCK_LEASES = 2  # without one write ended


@dataclass(slots=True, eq=False)
class Outgoing:
    """A request that this instance prefills for another to decode."""

    sequence: Sequence
    candidates: list[str]  # not asked yet
    transfer: Transfer | None = None
    choices: dict[int, list[int]] | None = None  # output ids of the choices that run on; None until prefilled
    prefilled_s: float = 0.0
    has_retried: bool = False  # a peer to which a write failed


class HandoffSender:
    """P's side. `decode_here(sequence, choices)` is called when no peer takes a prefilled request."""

    def __init__(
        self,
        name: str,
        block_size: int,
        clock: LeaseClock,
        send: SendTo,
        emit: Callable[[Effect], None],
        decode_here: Callable[[Sequence, dict[int, list[int]]], None],
    ) -> None:
        self._name = name
        self._block_size = block_size
        self._clock = clock
        self._send = send
        self._decode_here = decode_here
        self.links = Links()
        self._outgoing: dict[str, Outgoing] = {}
        self._transfers = Transfers(name, send, emit, self.links)
        self._watches = Watches(clock)
        self.counters = self._transfers.counters

    @property
    def num_sending(self) -> int:
        """Requests prefilled here whose blocks wait for the peer to have them."""
        return sum(outgoing.choices is not None for outgoing in self._outgoing.values())

    @property
    def sending(self) -> list[Sequence]:
        return [outgoing.sequence for outgoing in self._outgoing.values() if outgoing.choices is not None]

    @property
    def unanswered(self) -> list[tuple[str, str]]:
        """(Request id, peer) of those that only a silent peer can say the fate of."""
        opened = self._transfers.opened
        return [(t.request_id, t.peer) for t in opened if t.is_announced and self._watches.is_silent(t.peer)]

    @property
    def ids(self) -> list[str]:
        """Of requests that were prefilled here, and are this instance's until a peer has taken them over."""
        return [request_id for request_id, outgoing in self._outgoing.items() if outgoing.choices is not None]

    @property
    def is_idle(self) -> bool:
        return not self._outgoing and self._transfers.is_idle

    @property
    def is_quiet(self) -> bool:
        """No write is under way and no answer is awaited, so time that passes changes nothing."""
        return self._transfers.is_idle

    def is_pinned(self, sequence: Sequence) -> bool:
        """Its blocks are being read."""
        return self._transfers.is_pinned(sequence.request.request_id)

    # --- this instance's own steps ---------------------------------------------------------------------------------

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
            self._fall_back(outgoing)
        else:
            self._advance(outgoing)
        return True

    def give_up(self, request_id: str) -> Sequence | None:
        """Forget a request (aborted, or finished with its first token). Its sequence, if it was held here."""
        outgoing = self._outgoing.pop(request_id, None)
        if outgoing is None:
            return None
        if outgoing.transfer is not None:
            self._transfers.close(outgoing.transfer)
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

    # --- what peers and links say ----------------------------------------------------------------------------------

    def heard(self, peer: str, lease_s: float = 0.0) -> None:
        """Any message of a peer's: it lives, and may be silent for `lease_s` if it says so."""
        self._watches.heard(peer, lease_s)

    def on_reserved(self, message: Reserved) -> None:
        if self._is_over(message):
            return
        transfer = self._meant(message)
        if transfer is not None and transfer.dst_blocks is None:
            outgoing = self._outgoing[message.request_id]
            num_blocks = -(-len(outgoing.sequence.request.prompt_ids) // self._block_size)
            if len(message.block_ids) != num_blocks:
                raise ProtocolError(f"{message.instance} reserved {len(message.block_ids)} blocks, not {num_blocks}")
            transfer.dst_blocks, transfer.immediate = message.block_ids, message.immediate
            self._advance(outgoing)

    def on_refused(self, message: Refused) -> None:
        transfer = self._meant(message)
        if transfer is not None and transfer.dst_blocks is None:
            self._transfers.finish(transfer)
            self._reserve_next(self._outgoing[message.request_id])

    def on_cancel(self, message: Cancel) -> None:
        """D takes the reservation back; another one may have room."""
        if not self._is_over(message) and (transfer := self._meant(message)) is not None:
            self._leave(transfer)

    def on_release(self, message: Release) -> Sequence | None:
        """D owns the request now. The sequence whose blocks are free to go."""
        transfer = self._meant(message)
        if transfer is None or not transfer.is_announced:
            return None
        self.counters.num_transfers += 1
        self._transfers.finish(transfer)
        return self._outgoing.pop(message.request_id).sequence

    def on_written(self, written: Written) -> None:
        transfer = self._transfers.written(written)
        if written.error is None:
            return
        self.links.failed(transfer.peer)
        if transfer.is_closing:
            return
        if transfer.is_announced:
            transfer.has_failed = True  # how much of it the peer has counted, only the peer can say
        else:
            self._try_again_later(transfer)
            self._leave(transfer)

    def on_peer_down(self, peer: str) -> None:
        """What it had not taken over goes elsewhere; the KV is still here."""
        self.links.down(peer)
        for transfer in [t for t in self._transfers.opened if t.peer == peer]:
            self._transfers.finish(transfer)
            self._reserve_next(self._outgoing[transfer.request_id])

    def tick(self, elapsed_s: float) -> None:
        """So much time has passed: renew, repeat, and leave those who are silent."""
        self.links.pass_time(elapsed_s)
        if self._transfers.is_idle and self._watches.is_empty:
            return
        opened = self._transfers.opened
        for peer in self._watches.tick(elapsed_s, dict.fromkeys(t.peer for t in opened)):
            wanted = [t.attempt for t in opened if t.peer == peer and self._is_wanted(t)]
            self._send(peer, Renew(self._name, wanted, self._clock.lease_s))
        for transfer in opened:
            is_stuck = self._is_stuck(transfer, elapsed_s)
            if not transfer.is_announced and (is_stuck or self._watches.is_silent(transfer.peer)):
                self._leave(transfer)
            else:
                transfer.has_failed |= is_stuck
                self._wait(transfer, elapsed_s)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _meant(self, message: Reserved | Refused | Release | Cancel) -> Transfer | None:
        """The one that the message is about. None where it is over, or is not that peer's."""
        transfer = self._transfers.get(message.attempt)
        is_its = transfer is not None and (transfer.peer, transfer.request_id) == (message.instance, message.request_id)
        return transfer if is_its else None

    def _is_over(self, message: Reserved | Cancel) -> bool:
        """D holds blocks for something that nobody here knows (any more): they are D's own again."""
        if self._transfers.knows(message.attempt):
            return False
        self._send(message.instance, CancelAck(self._name, message.request_id, message.attempt))
        return True

    def _is_wanted(self, transfer: Transfer) -> bool:
        """Whether it may still succeed, as far as this side knows."""
        return not transfer.has_failed and transfer.drained_s < self._clock.lease_s

    def _is_stuck(self, transfer: Transfer, elapsed_s: float) -> bool:
        """Whether the link has moved nothing of it for so long that it cannot be waited for, though the peer lives."""
        if transfer.in_flight:
            transfer.stuck_s += elapsed_s
        return transfer.stuck_s >= _STUCK_LEASES * self._clock.lease_s

    def _wait(self, transfer: Transfer, elapsed_s: float) -> None:
        if transfer.is_announced and not transfer.in_flight:
            transfer.drained_s += elapsed_s
        if transfer.dst_blocks is not None and not transfer.is_announced:
            return
        transfer.unanswered_s += elapsed_s
        if transfer.unanswered_s >= self._clock.beat_s:
            transfer.unanswered_s = 0.0
            self._ask(transfer)

    def _ask(self, transfer: Transfer) -> None:
        """Send what the peer has to answer: `Reserve`, or `KvReady` once all is posted."""
        outgoing = self._outgoing[transfer.request_id]
        sequence = outgoing.sequence
        if transfer.dst_blocks is None:
            message: Reserve | KvReady = Reserve(
                self._name, transfer.attempt, sequence.request, sequence.frontend_address,
                self._transfers.oldest_attempt, self._clock.lease_s,
            )  # fmt: skip
        else:
            assert outgoing.choices is not None
            num_blocks = len(transfer.dst_blocks)
            message = KvReady(self._name, transfer.request_id, transfer.attempt, num_blocks, outgoing.choices)
        self._send(transfer.peer, message)

    def _try_again_later(self, transfer: Transfer) -> None:
        """The error may pass: the same peer once more, if no other has room."""
        outgoing = self._outgoing[transfer.request_id]
        if not outgoing.has_retried:
            outgoing.has_retried = True
            outgoing.candidates.append(transfer.peer)

    def _leave(self, transfer: Transfer) -> None:
        self._transfers.close(transfer)
        self._reserve_next(self._outgoing[transfer.request_id])

    def _reserve_next(self, outgoing: Outgoing) -> None:
        outgoing.transfer = None
        while outgoing.candidates:
            peer = outgoing.candidates.pop(0)
            if self.links.is_good(peer) and not self._watches.is_silent(peer):
                outgoing.transfer = self._transfers.begin(outgoing.sequence.request.request_id, peer)
                self._ask(outgoing.transfer)
                return
        if outgoing.choices is not None:
            self._fall_back(outgoing)

    def _advance(self, outgoing: Outgoing) -> None:
        """Post the runs of every block that is finished and not yet sent; announce when that was all."""
        transfer = outgoing.transfer
        if transfer is None or transfer.dst_blocks is None:
            return
        sequence = outgoing.sequence
        done = sequence.num_computed // self._block_size
        if outgoing.choices is not None:
            done, transfer.prefilled_s = len(transfer.dst_blocks), outgoing.prefilled_s
        if done > transfer.num_sent_blocks:
            part = slice(transfer.num_sent_blocks, done)
            transfer.num_sent_blocks = done
            self._transfers.post(transfer, plan_runs(sequence.block_table[part], transfer.dst_blocks[part]))
        if outgoing.choices is not None:
            transfer.is_announced = True
            self._ask(transfer)

    def _fall_back(self, outgoing: Outgoing) -> None:
        assert outgoing.choices is not None
        self.counters.num_fallbacks += 1
        del self._outgoing[outgoing.sequence.request.request_id]
        self._decode_here(outgoing.sequence, outgoing.choices)
