"""What this instance writes into the pools of others: attempts, their writes, and whose blocks these read."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from flowkv.engine.effects import CancelWrite, Effect, Write
from flowkv.engine.links import Links
from flowkv.messages import CancelAck, Message
from flowkv.transfer.base import Written
from flowkv.transfer.plan import Run

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
    is_announced: bool = False  # `KvReady` is out: the peer may own the request
    is_closing: bool = False  # over for this side: `CancelAck` follows when nothing is in flight
    has_failed: bool = False  # a write could not be made
    prefilled_s: float = math.inf
    unanswered_s: float = 0.0  # since `Reserve` or `KvReady` was last sent
    drained_s: float = 0.0  # since it was announced and nothing in flight
    stuck_s: float = 0.0  # since a write of it was posted or ended, while others are in flight


@dataclass(slots=True)
class TransferCounters:
    num_bytes: int = 0
    num_calls: int = 0
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    num_transfers: int = 0
    num_fallbacks: int = 0


class Transfers:
    """Every attempt until its last write is done. Attempts and tickets are numbered, and no number is used twice."""

    def __init__(self, name: str, send: SendTo, emit: Callable[[Effect], None], links: Links) -> None:
        self._name = name
        self._send = send
        self._emit = emit
        self._links = links
        self._transfers: dict[int, Transfer] = {}  # by attempt, oldest first
        self._by_ticket: dict[int, Transfer] = {}
        self._num_in_flight: dict[str, int] = {}  # writes, by request
        self._attempts = count(1)
        self._tickets = count(1)
        self.counters = TransferCounters()

    @property
    def is_idle(self) -> bool:
        return not (self._transfers or self._by_ticket)

    @property
    def opened(self) -> list[Transfer]:
        """Those that are not over, oldest first."""
        return [transfer for transfer in self._transfers.values() if not transfer.is_closing]

    @property
    def oldest_attempt(self) -> int:
        """No lower one is open or being written."""
        return next(iter(self._transfers))

    def knows(self, attempt: int) -> bool:
        return attempt in self._transfers

    def get(self, attempt: int) -> Transfer | None:
        """None for one that is over."""
        transfer = self._transfers.get(attempt)
        return None if transfer is None or transfer.is_closing else transfer

    def is_pinned(self, request_id: str) -> bool:
        """Its blocks are being read."""
        return request_id in self._num_in_flight

    def begin(self, request_id: str, peer: str) -> Transfer:
        transfer = Transfer(request_id, next(self._attempts), peer)
        self._transfers[transfer.attempt] = transfer
        return transfer

    def post(self, transfer: Transfer, runs: list[Run]) -> None:
        ticket = next(self._tickets)
        transfer.in_flight.add(ticket)
        transfer.stuck_s = 0.0
        self._by_ticket[ticket] = transfer
        self._num_in_flight[transfer.request_id] = self._num_in_flight.get(transfer.request_id, 0) + 1
        self.counters.num_calls += len(runs)
        self._links.count(transfer.peer, 0, len(runs), 0.0)
        self._emit(Write(ticket, transfer.peer, runs, transfer.immediate))

    def written(self, written: Written) -> Transfer:
        """A write is done; the transfer that it belongs to."""
        transfer = self._by_ticket.pop(written.ticket)
        transfer.in_flight.remove(written.ticket)
        transfer.stuck_s = 0.0
        remaining = self._num_in_flight.pop(transfer.request_id) - 1
        if remaining:
            self._num_in_flight[transfer.request_id] = remaining
        self._links.count(transfer.peer, written.num_bytes, 0, written.seconds)
        self.counters.num_bytes += written.num_bytes
        self.counters.seconds += written.seconds
        after_prefill_s = max(0.0, written.finished_s - transfer.prefilled_s)
        self.counters.exposed_seconds += min(written.seconds, after_prefill_s)
        if transfer.is_closing and not transfer.in_flight:
            self._acknowledge(transfer)
        return transfer

    def close(self, transfer: Transfer) -> None:
        """Give it up. The peer hears of it once nothing can be written any more."""
        transfer.is_closing = True
        for ticket in sorted(transfer.in_flight):
            self._emit(CancelWrite(ticket))
        if not transfer.in_flight:
            self._acknowledge(transfer)

    def finish(self, transfer: Transfer) -> None:
        """The peer has said its last word on it, or is dead: if anything is missing, then only our own completions."""
        if transfer.in_flight:
            transfer.is_closing = True
        else:
            del self._transfers[transfer.attempt]

    def _acknowledge(self, transfer: Transfer) -> None:
        """Nothing of it is in flight any more. Harmless where the peer has it all already, or is dead."""
        del self._transfers[transfer.attempt]
        self._send(transfer.peer, CancelAck(self._name, transfer.request_id, transfer.attempt))
