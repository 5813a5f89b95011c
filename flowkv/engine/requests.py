"""The requests of one instance: which sequences each has in the queues, and what is left of those that are over."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count

from flowkv.engine.batch import Batch
from flowkv.engine.handoff_receiver import Incoming
from flowkv.engine.leases import LeaseClock
from flowkv.engine.report import Reporter
from flowkv.engine.scheduler import HybridScheduler
from flowkv.engine.sequence import Sequence
from flowkv.kv.blocks import BlockManager
from flowkv.messages import Dispatch
from flowkv.types import OutputIds

_HEAD_START = 2**40  # more than ever arrive


@dataclass(slots=True)
class _Running:
    sequences: list[Sequence] = field(default_factory=list)  # in the scheduler's queues
    num_ended_tokens: int = 0  # put out by choices that are over


class Requests:
    """Every sequence in the scheduler's queues stands in here, by its request.

    One that is over goes to limbo: its blocks are freed by `sweep`, when nobody writes or reads them any more.
    """

    def __init__(
        self, blocks: BlockManager, scheduler: HybridScheduler, reporter: Reporter, clock: LeaseClock
    ) -> None:  # fmt: skip
        self._blocks = blocks
        self._scheduler = scheduler
        self._reporter = reporter
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._arrivals = count()
        self._limbo: list[Sequence] = []

    @property
    def has_limbo(self) -> bool:
        return bool(self._limbo)

    @property
    def ids(self) -> list[str]:
        """Of those that are not over."""
        return list(self._running)

    @property
    def block_tables(self) -> list[list[int]]:
        """All that are held here."""
        running = [s.block_table for running in self._running.values() for s in running.sequences]
        return running + [s.block_table for s in self._limbo]

    def has(self, request_id: str) -> bool:
        return request_id in self._running

    # --- they come -------------------------------------------------------------------------------------------------

    def add(self, message: Dispatch) -> Sequence:
        """A request whose prompt is to be computed here."""
        sequence = self._sequence(message, num_choices=message.request.sampling.n)
        self._queue(message.request.request_id, [sequence])
        return sequence

    def resume(self, message: Dispatch) -> None:
        """A request that goes on after what its choices have put out elsewhere: each is as if it was preempted here.

        Its client has begun to read, so it counts as older than all whose first token is still to come.
        """
        sequences = [
            self._sequence(message, choice=choice, output_ids=output_ids, head_start=_HEAD_START)
            for choice, output_ids in message.output_ids.items()
        ]
        self._queue(message.request.request_id, sequences)

    def _sequence(
        self,
        message: Dispatch,
        *,
        choice: int = 0,
        num_choices: int = 1,
        output_ids: Iterable[int] = (),
        head_start: int = 0,
    ) -> Sequence:
        sequence = Sequence(
            message.request, message.frontend_address, next(self._arrivals) - head_start,
            choice=choice, num_choices=num_choices, output_ids=list(output_ids),
        )  # fmt: skip
        sequence.stamps.queued_s = self._clock.now_s
        return sequence

    def _queue(self, request_id: str, sequences: list[Sequence]) -> None:
        self._running[request_id] = _Running(sequences)
        for sequence in sequences:
            self._scheduler.add(sequence)

    def adopt(self, incoming: Incoming) -> None:
        """A request whose prompt was computed elsewhere is ours, with its blocks."""
        reserve = incoming.reserve
        root = Sequence(
            reserve.request,
            reserve.frontend_address,
            next(self._arrivals),
            num_choices=reserve.request.sampling.n,
            num_computed=len(reserve.request.prompt_ids),
            block_table=incoming.block_table,
            stamps=incoming.stamps,
        )
        self.decode(root, incoming.choices)

    def decode(self, root: Sequence, choices: OutputIds) -> None:
        """Fork a computed prompt into the choices that run on; `root` gives its blocks up to them.

        Those that do not run on ended with the one token that was drawn for each.
        """
        request_id = root.request.request_id
        running = self._running.setdefault(request_id, _Running())
        running.num_ended_tokens += root.num_choices - len(choices)
        for (choice, output_ids), table in zip(choices.items(), self._tables(root, len(choices)), strict=True):
            fork = Sequence(
                root.request,
                root.frontend_address,
                root.arrival,
                choice=choice,
                output_ids=list(output_ids),
                num_computed=root.num_computed,
                block_table=table,
                stamps=replace(root.stamps),
            )
            self._scheduler.start_decoding(fork)
            running.sequences.append(fork)
        self._finish_if_over(request_id)

    def _tables(self, root: Sequence, count: int) -> list[list[int]]:
        """So many over the blocks of `root`, which has none any more: its own is the first."""
        table, root.block_table = root.block_table, []
        if count == 0:
            self._blocks.free(table)
            return []
        return [table, *(self._blocks.fork(table) for _ in range(count - 1))]

    # --- they go ---------------------------------------------------------------------------------------------------

    def take_out(self, sequence: Sequence) -> None:
        """Its prompt is computed: out of the queues, to `decode` here or to be handed over.

        What is handed over has put nothing out before, and leaves nothing behind.
        """
        request_id = sequence.request.request_id
        self._scheduler.remove(sequence)
        running = self._running[request_id]
        running.sequences.remove(sequence)
        if not running.sequences and not running.num_ended_tokens:
            del self._running[request_id]

    def end(self, sequence: Sequence, num_last_tokens: int = 0) -> None:
        """It is over: with its `output_ids`, and so many tokens that are not among them."""
        request_id = sequence.request.request_id
        self._scheduler.remove(sequence)
        self.hold(sequence)
        running = self._running[request_id]
        running.sequences.remove(sequence)
        running.num_ended_tokens += len(sequence.output_ids) + num_last_tokens
        self._finish_if_over(request_id)

    def abort(self, request_id: str, choice: int | None) -> None:
        running = self._running.get(request_id)
        for sequence in list(running.sequences) if running is not None else ():
            if choice is None or (sequence.num_choices == 1 and sequence.choice == choice):
                self.end(sequence)

    def give_back(self) -> list[str]:
        """Forget the requests of which nothing has begun."""
        waiting = dict.fromkeys(sequence.request.request_id for sequence in self._scheduler.waiting)
        given = [request_id for request_id in waiting if not self._has_begun(request_id)]
        for request_id in given:
            for sequence in self._running.pop(request_id).sequences:
                self._scheduler.remove(sequence)
        return given

    def _has_begun(self, request_id: str) -> bool:
        running = self._running[request_id]
        return bool(running.num_ended_tokens) or any(sequence.has_begun for sequence in running.sequences)

    def hold(self, sequence: Sequence) -> None:
        """Over, or another instance's; but its blocks may still be in use."""
        sequence.is_over = True
        self._limbo.append(sequence)

    def sweep(self, in_flight: Batch | None) -> None:
        """Free the blocks of what is over and no longer in use."""
        if not self._limbo:
            return
        computing = {id(item.sequence) for item in in_flight.items} if in_flight else set()
        waiting = []
        for sequence in self._limbo:
            if id(sequence) in computing or self._scheduler.is_pinned(sequence):
                waiting.append(sequence)
            else:
                self._blocks.free(sequence.block_table)
        self._limbo = waiting

    def _finish_if_over(self, request_id: str) -> None:
        running = self._running[request_id]
        if not running.sequences:
            del self._running[request_id]
            self._reporter.finished(request_id, running.num_ended_tokens)
