"""How a request that was prefilled elsewhere becomes this instance's own. `handoff_sender` draws the protocol."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from flowkv.engine.handoff_sender import SendTo
from flowkv.kv.blocks import BlockManager
from flowkv.messages import Cancel, CancelAck, KvReady, Refused, Release, Reserve, Reserved
from flowkv.transfer.base import Arrived


@dataclass(slots=True, eq=False)
class Incoming:
    """Blocks of this instance that a peer fills."""

    reserve: Reserve
    immediate: int
    block_table: list[int]
    num_arrived: int = 0
    ready: KvReady | None = None
    dropped_choices: set[int] = field(default_factory=set)
    is_cancelled: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return (self.reserve.source, self.reserve.attempt)

    @property
    def is_complete(self) -> bool:
        return self.ready is not None and self.num_arrived >= self.ready.num_blocks and not self.is_cancelled

    @property
    def choices(self) -> dict[int, list[int]]:
        assert self.ready is not None
        return {c: ids for c, ids in self.ready.output_ids.items() if c not in self.dropped_choices}


class HandoffReceiver:
    """D's side. `adopt(incoming)` is called when a request and all of its KV are this instance's own."""

    def __init__(self, name: str, blocks: BlockManager, send: SendTo, adopt: Callable[[Incoming], None]) -> None:
        self._name = name
        self._blocks = blocks
        self._send = send
        self._adopt = adopt
        self._incoming: dict[tuple[str, int], Incoming] = {}
        self._by_immediate: dict[int, Incoming] = {}
        self._last_attempt: dict[str, int] = {}  # by source
        self._dead: set[str] = (
            set()
        )  # what they sent last may come after the news of their death; names are never reused
        self._immediates = count(1)

    @property
    def incoming(self) -> list[Incoming]:
        """Oldest first."""
        return list(self._incoming.values())

    @property
    def num_choices(self) -> int:
        return sum(incoming.reserve.request.sampling.n for incoming in self._incoming.values())

    @property
    def num_reserved_blocks(self) -> int:
        return sum(len(incoming.block_table) for incoming in self._incoming.values())

    def on_reserve(self, message: Reserve, has_room: bool) -> None:
        """Allocate and answer. `has_room` is the scheduler's word beyond the mere number of free blocks."""
        if message.source in self._dead or message.attempt <= self._last_attempt.get(message.source, 0):
            return
        self._last_attempt[message.source] = message.attempt
        request_id = message.request.request_id
        table = (
            self._blocks.allocate(self._blocks.num_blocks_for(len(message.request.prompt_ids))) if has_room else None
        )
        if table is None:
            self._send(message.source, Refused(self._name, request_id, message.attempt))
            return
        incoming = Incoming(message, next(self._immediates), table)
        self._incoming[incoming.key] = self._by_immediate[incoming.immediate] = incoming
        answer = Reserved(self._name, request_id, message.attempt, incoming.immediate, list(table))
        self._send(message.source, answer)

    def on_arrived(self, arrived: Arrived) -> None:
        """Immediates are never used twice, so a count for one that is gone is of no one's concern."""
        if (incoming := self._by_immediate.get(arrived.immediate)) is not None:
            incoming.num_arrived += arrived.num_blocks
            self._finish(incoming)

    def on_ready(self, message: KvReady) -> None:
        if (incoming := self._incoming.get((message.source, message.attempt))) is not None:
            incoming.ready = message
            self._finish(incoming)

    def on_cancel_ack(self, message: CancelAck) -> None:
        """The writer is done with these blocks, whoever gave up first."""
        if (incoming := self._incoming.get((message.source, message.attempt))) is not None:
            self._forget(incoming)
            self._blocks.free(incoming.block_table)

    def on_peer_down(self, source: str) -> None:
        """The writer is dead and writes no more: that is as good as its word."""
        self._dead.add(source)
        self._last_attempt.pop(source, None)
        for incoming in [i for i in self._incoming.values() if i.reserve.source == source]:
            self._forget(incoming)
            self._blocks.free(incoming.block_table)

    def abort(self, request_id: str, choice: int | None) -> None:
        for incoming in self._incoming.values():
            if incoming.reserve.request.request_id != request_id:
                continue
            if choice is None:
                self._cancel(incoming)
            else:
                incoming.dropped_choices.add(choice)

    def revoke_youngest(self) -> None:
        """Take back the reservation made last, to break a standstill; its source goes elsewhere. One at a time."""
        incoming = self.incoming
        if incoming and not any(i.is_cancelled for i in incoming):
            self._cancel(incoming[-1])

    def _cancel(self, incoming: Incoming) -> None:
        if not incoming.is_cancelled:
            incoming.is_cancelled = True
            reserve = incoming.reserve
            self._send(reserve.source, Cancel(self._name, reserve.request.request_id, reserve.attempt))

    def _finish(self, incoming: Incoming) -> None:
        if incoming.is_complete:
            self._forget(incoming)
            reserve = incoming.reserve
            self._send(reserve.source, Release(self._name, reserve.request.request_id, reserve.attempt))
            self._adopt(incoming)

    def _forget(self, incoming: Incoming) -> None:
        del self._incoming[incoming.key]
        del self._by_immediate[incoming.immediate]
