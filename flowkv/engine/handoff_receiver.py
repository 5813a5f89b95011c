"""How a request that was prefilled elsewhere becomes this instance's own. `handoff_sender` draws the protocol."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from flowkv.engine.effects import Effect, Expect, Forget
from flowkv.engine.history import Fate, History
from flowkv.engine.leases import LeaseClock
from flowkv.engine.timing import Stamps
from flowkv.engine.transfers import SendTo
from flowkv.kv.blocks import BlockManager
from flowkv.messages import Cancel, CancelAck, KvReady, Refused, Release, Renew, Renewed, Reserve, Reserved
from flowkv.transfer.base import Arrived


@dataclass(slots=True, eq=False)
class Incoming:
    """Blocks of this instance that a peer fills."""

    reserve: Reserve
    immediate: int
    block_table: list[int]
    lease_s: float
    num_arrived: int = 0
    ready: KvReady | None = None
    dropped_choices: set[int] = field(default_factory=set)
    is_cancelled: bool = False  # its blocks are in quarantine
    is_orphan: bool = False  # its source is dead; only what the network still carries may come
    silent_s: float = 0.0  # since it was last renewed
    unacknowledged_s: float = 0.0  # since `Cancel` was last sent
    stamps: Stamps = field(default_factory=Stamps)

    @property
    def key(self) -> tuple[str, int]:
        return (self.reserve.source, self.reserve.attempt)

    @property
    def is_complete(self) -> bool:
        return self.ready is not None and self.num_arrived >= self.ready.num_blocks and not self.is_cancelled

    @property
    def is_silent(self) -> bool:
        return self.silent_s >= self.lease_s

    @property
    def choices(self) -> dict[int, list[int]]:
        assert self.ready is not None
        return {c: ids for c, ids in self.ready.output_ids.items() if c not in self.dropped_choices}


class HandoffReceiver:
    """D's side. `adopt(incoming)` is called when a request and all of its KV are this instance's own."""

    def __init__(
        self,
        name: str,
        blocks: BlockManager,
        clock: LeaseClock,
        send: SendTo,
        emit: Callable[[Effect], None],
        adopt: Callable[[Incoming], None],
    ) -> None:
        self._name = name
        self._blocks = blocks
        self.allocate = blocks.allocate  # who has a better way to come by blocks that lie together may set it
        self._clock = clock
        self._send = send
        self._emit = emit
        self._adopt = adopt
        self._incoming: dict[tuple[str, int], Incoming] = {}
        self._by_immediate: dict[int, Incoming] = {}
        self._histories: dict[str, History] = {}  # by source
        self._dead: set[str] = set()  # their last words may come after the news of their death; names are not reused
        self._immediates = count(1)
        self.num_expired = 0  # leases

    @property
    def incoming(self) -> list[Incoming]:
        """Oldest first."""
        return list(self._incoming.values())

    @property
    def num_incoming(self) -> int:
        return len(self._incoming)

    @property
    def num_choices(self) -> int:
        return sum(i.reserve.request.sampling.n for i in self._incoming.values() if not i.is_cancelled)

    @property
    def num_reserved_blocks(self) -> int:
        return sum(len(incoming.block_table) for incoming in self._incoming.values())

    @property
    def num_quarantined_blocks(self) -> int:
        return sum(len(incoming.block_table) for incoming in self._incoming.values() if incoming.is_cancelled)

    @property
    def has_incoming(self) -> bool:
        return bool(self._incoming)

    @property
    def quiet_s(self) -> float:
        """For so long nothing comes of the mere passing of time, as `tick` counts it."""
        if any(incoming.is_cancelled for incoming in self._incoming.values()):
            return 0.0
        return min((i.lease_s - i.silent_s for i in self._incoming.values()), default=math.inf)

    # --- what a source says ----------------------------------------------------------------------------------------

    def on_reserve(self, message: Reserve, has_room: bool) -> None:
        """Allocate and answer. `has_room` is the scheduler's word beyond the mere number of free blocks."""
        if message.source in self._dead:
            return
        history = self._history(message.source)
        history.settle_below(message.oldest_attempt)
        incoming = self._incoming.get((message.source, message.attempt))
        fate = history.fate(message.attempt)
        if incoming is None and fate is Fate.UNKNOWN:
            incoming = self._reserve(message) if has_room else None
        if incoming is not None:
            self._answer_reserve(incoming)
        elif fate is Fate.ADOPTED:
            self._release(message.source, message.request.request_id, message.attempt)
        elif fate is not Fate.SETTLED:
            history.end(message.attempt, Fate.ENDED)
            self._send(message.source, Refused(self._name, message.request.request_id, message.attempt))

    def on_ready(self, message: KvReady) -> None:
        if message.source in self._dead:
            return
        incoming = self._incoming.get((message.source, message.attempt))
        fate = self._history(message.source).fate(message.attempt)
        if incoming is not None and not incoming.is_cancelled:
            incoming.stamps.fill(self._clock.now_s)
            incoming.ready = message
            self._finish(incoming)
        elif fate is Fate.ADOPTED:
            self._release(message.source, message.request_id, message.attempt)
        elif fate is not Fate.SETTLED:
            self._send(message.source, Cancel(self._name, message.request_id, message.attempt))

    def on_renew(self, message: Renew) -> None:
        for attempt in message.attempts:
            if (incoming := self._incoming.get((message.source, attempt))) is not None:
                incoming.silent_s = 0.0
                incoming.lease_s = max(self._clock.lease_s, message.lease_s)
        self._send(message.source, Renewed(self._name, self._clock.lease_s))

    def on_cancel_ack(self, message: CancelAck) -> None:
        """The writer is done with these blocks, whoever gave up first. What comes late for them reserves nothing."""
        if message.source in self._dead:
            return
        self._history(message.source).end(message.attempt, Fate.ENDED)
        if (incoming := self._incoming.get((message.source, message.attempt))) is not None:
            self._let_go(incoming)

    def on_peer_down(self, source: str, may_linger: bool = False) -> None:
        """The writer is dead and writes no more: that is as good as its word.

        Where what it has sent `may_linger` in a network, its blocks stay in quarantine for another lease: bytes that
        this node's kernel has, and the news of the death, do not wait for each other.
        """
        self._dead.add(source)
        self._histories.pop(source, None)
        for incoming in [i for i in self._incoming.values() if i.reserve.source == source]:
            if may_linger:
                incoming.is_cancelled = incoming.is_orphan = True
                incoming.silent_s = 0.0
            else:
                self._let_go(incoming)

    # --- what else happens -----------------------------------------------------------------------------------------

    def on_arrived(self, arrived: Arrived) -> None:
        """Immediates are never used twice, so a count for one that is gone is of no one's concern."""
        if (incoming := self._by_immediate.get(arrived.immediate)) is not None:
            incoming.stamps.fill(self._clock.now_s)
            incoming.num_arrived += arrived.num_blocks
            incoming.silent_s = 0.0
            self._finish(incoming)

    def may_wait(self, arrived: Arrived) -> bool:
        """Whether nothing follows from these blocks until the source has said that it has posted all."""
        incoming = self._by_immediate.get(arrived.immediate)
        return incoming is None or incoming.ready is None

    def abort(self, request_id: str, choice: int | None) -> None:
        for incoming in self._incoming.values():
            if incoming.reserve.request.request_id != request_id:
                continue
            if choice is None:
                self._cancel(incoming)
            else:
                incoming.dropped_choices.add(choice)

    def revoke_youngest(self) -> None:
        """Take back the reservation made last, to break a standstill; its source goes elsewhere.

        One at a time, but those whose source is silent may take for ever.
        """
        live = [incoming for incoming in self._incoming.values() if not incoming.is_cancelled]
        is_waiting = any(i.is_cancelled and not i.is_silent for i in self._incoming.values())
        if live and not is_waiting:
            self._cancel(live[-1])

    def tick(self, elapsed_s: float) -> None:
        """So much time has passed: quarantine what is not renewed, and ask again for what is in quarantine."""
        for incoming in list(self._incoming.values()):
            incoming.silent_s += elapsed_s
            incoming.unacknowledged_s += elapsed_s
            if incoming.is_orphan:
                if incoming.is_silent:
                    self._let_go(incoming)
            elif not incoming.is_cancelled:
                if incoming.is_silent:
                    self.num_expired += 1
                    self._cancel(incoming)
            elif incoming.unacknowledged_s >= self._clock.beat_s:
                self._send_cancel(incoming)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _history(self, source: str) -> History:
        return self._histories.setdefault(source, History())

    def _reserve(self, message: Reserve) -> Incoming | None:
        table = self.allocate(self._blocks.num_blocks_for(len(message.request.prompt_ids)))
        if table is None:
            return None
        incoming = Incoming(message, next(self._immediates), table, max(self._clock.lease_s, message.lease_s))
        incoming.stamps.reserved_s = self._clock.now_s
        self._incoming[incoming.key] = self._by_immediate[incoming.immediate] = incoming
        self._emit(Expect(incoming.immediate))
        return incoming

    def _answer_reserve(self, incoming: Incoming) -> None:
        if incoming.is_cancelled:
            self._send_cancel(incoming)
            return
        reserve = incoming.reserve
        incoming.silent_s = 0.0
        answer = Reserved(
            self._name, reserve.request.request_id, reserve.attempt, incoming.immediate, list(incoming.block_table)
        )
        self._send(reserve.source, answer)

    def _release(self, source: str, request_id: str, attempt: int) -> None:
        self._send(source, Release(self._name, request_id, attempt))

    def _cancel(self, incoming: Incoming) -> None:
        if not incoming.is_cancelled:
            incoming.is_cancelled = True
            self._send_cancel(incoming)

    def _send_cancel(self, incoming: Incoming) -> None:
        incoming.unacknowledged_s = 0.0
        reserve = incoming.reserve
        self._send(reserve.source, Cancel(self._name, reserve.request.request_id, reserve.attempt))

    def _finish(self, incoming: Incoming) -> None:
        if incoming.is_complete:
            self._forget(incoming)
            reserve = incoming.reserve
            self._history(reserve.source).end(reserve.attempt, Fate.ADOPTED)
            self._release(reserve.source, reserve.request.request_id, reserve.attempt)
            incoming.stamps.ready_s = self._clock.now_s
            self._adopt(incoming)

    def _let_go(self, incoming: Incoming) -> None:
        """Nobody writes its blocks any more."""
        self._forget(incoming)
        self._blocks.free(incoming.block_table)

    def _forget(self, incoming: Incoming) -> None:
        del self._incoming[incoming.key]
        del self._by_immediate[incoming.immediate]
        self._emit(Forget(incoming.immediate))
