"""One instance as a state machine: messages and the time go in, batches and effects come out. No I/O, no torch.

A step is two calls: `next_batch` gives what to compute, `on_result` takes what came of it. In between, messages may be
handled; blocks that the batch in flight writes are not given to anyone else before its result is in.
"""

from collections.abc import Sequence as SequenceOf
from itertools import count

import msgspec

from flowkv.config import EngineConfig, TransferConfig
from flowkv.engine.batch import Batch, BatchResult
from flowkv.engine.effects import Connect, Disconnect, Effect, MoveBlocks, Send
from flowkv.engine.handoff_receiver import HandoffReceiver, Incoming
from flowkv.engine.handoff_sender import HandoffSender
from flowkv.engine.leases import LeaseClock
from flowkv.engine.orders import Orders
from flowkv.engine.peers import Peers
from flowkv.engine.repeat import foreseen_steps
from flowkv.engine.report import Reporter, State
from flowkv.engine.requests import Requests
from flowkv.engine.results import Results
from flowkv.engine.scheduler import HybridScheduler, Step
from flowkv.engine.sequence import Sequence
from flowkv.errors import ProtocolError
from flowkv.kv.blocks import BlockManager
from flowkv.messages import (
    Abort,
    Cancel,
    CancelAck,
    Dispatch,
    Drain,
    KvReady,
    Message,
    Outputs,
    PeerDown,
    PeerUp,
    Refused,
    Register,
    Release,
    Renew,
    Renewed,
    Reserve,
    Reserved,
    SetRole,
)
from flowkv.transfer.backends import may_outlive_writer
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.types import InstanceCounters, InstanceLoad, OutputIds, Role

_LEASE_MARGIN = 0.999  # of a stretch of steps within a lease: sums of seconds are rounded
_STEPS_MARGIN = 1.1  # steps planned for as many as there will be
_SHORTEST_STEP_S = 1e-6


class Engine:
    """The requests, the blocks and the handoffs of one instance.

    `address` is its mailbox. With `max_itl_s` prompts share a step with decodes only as far as that keeps it so short
    (`HybridScheduler`).
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        num_blocks: int,
        role: Role,
        controller_address: str,
        lease_s: float = TransferConfig().lease_s,
        max_itl_s: float | None = None,
        address: str = "",
    ) -> None:
        self.name = name
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.scheduler = HybridScheduler(config, self.blocks, role, max_itl_s)
        self._config = config
        self._effects: list[Effect] = []
        self._peers = Peers()
        self._batch_ids = count(1)
        self._in_flight: Batch | None = None
        self._began_s = 0.0  # the batch in flight
        self._last_step_s = 0.0  # how long it took
        self._held_reserves: list[Reserve] = []  # until the step in flight is over
        self._has_drained = False  # and was said to have
        cost = None if max_itl_s is None else self.scheduler.cost
        self._reporter = Reporter((name, address), controller_address, cost)
        self._clock = LeaseClock(lease_s)
        self._requests = Requests(self.blocks, self.scheduler, self._reporter, self._clock)
        send, emit = self._send_peer, self._effects.append
        self._sender = HandoffSender(name, config.block_size, self._clock, send, emit, self._decode_here)
        self._receiver = HandoffReceiver(name, self.blocks, self._clock, send, emit, self._adopt)
        self._results = Results(self._requests, self._sender)
        self._orders = Orders(
            name, self.scheduler, self._requests, self._sender, self._receiver, self._reporter, emit
        )  # fmt: skip
        self.scheduler.is_pinned = self._sender.is_pinned
        if config.max_segments:
            self._receiver.allocate = self._allocate_together

    # --- in --------------------------------------------------------------------------------------------------------

    def handle(self, message: Message, now_s: float) -> None:
        """One message. ProtocolError for one that no instance should ever get."""
        self._clock.now_s = now_s
        match message:
            case Dispatch():
                self._orders.on_dispatch(message)
            case Abort():
                self._orders.on_abort(message)
                self._requests.sweep(self._in_flight)
            case Reserve() | KvReady() | Renew() | CancelAck():
                self._hear_source(message)
            case Reserved() | Refused() | Renewed() | Release() | Cancel():
                self._hear_receiver(message)
            case SetRole():
                self._orders.on_set_role(message)
            case Drain():
                self._orders.on_drain()
            case PeerUp():
                self._on_peer_up(message)
            case PeerDown():
                self._on_peer_down(message)
            case _:
                raise ProtocolError(f"an instance does not take a {type(message).__name__}")
        self._report(now_s)

    def on_linked(self, linked: Linked, now_s: float) -> None:
        """A peer's pool can be written to: the controller waits for this before it places anything here."""
        if self._peers.is_dead(linked.peer):
            return  # the news of its end came first
        self._sender.links.up(linked)
        self._reporter.is_due = True
        self._report(now_s)

    def on_written(self, written: Written, now_s: float) -> None:
        """A `Write` effect is done: its source blocks are no longer read."""
        self._sender.on_written(written)
        self._requests.sweep(self._in_flight)
        self._report(now_s)

    def on_arrived(self, arrived: Arrived, now_s: float) -> None:
        """A peer has written blocks into this instance's pool."""
        self._clock.now_s = now_s
        self._receiver.on_arrived(arrived)
        self._report(now_s)

    def may_wait(self, arrived: Arrived) -> bool:
        """Whether nothing follows from these blocks before a message comes, so that steps can go on at a stretch."""
        return self._receiver.may_wait(arrived)

    def tick(self, now_s: float) -> None:
        """Called between steps, and at a slow beat while idle, when all messages and completions have been handled."""
        self._pass_time(now_s)
        self._report(now_s)

    # --- steps -----------------------------------------------------------------------------------------------------

    def next_batch(self, now_s: float, max_repeats: int = 1) -> Batch | None:
        """What to compute now, or None if there is nothing to do before the next message.

        At most `max_repeats` steps at a stretch (`Batch.num_repeats`), more than one only where nothing but a message,
        a completion or the next report can come between: then all is as after that many single steps, but for the
        number of `Outputs`.
        """
        assert self._in_flight is None, "the result of the last batch is not in yet"
        step = self.scheduler.schedule()
        if not step.items:
            self._break_standstill()
            return None
        for sequence in step.begun:
            sequence.stamps.start(now_s)
            self._sender.start(sequence)
        num_repeats, until_s = 1, self._reporter.due_s
        if max_repeats > 1 and self._may_repeat(step):
            until_s = min(until_s, now_s + _LEASE_MARGIN * self._receiver.quiet_s)
            num_repeats = self._take_steps(step, min(max_repeats, self._steps_within(until_s - now_s)))
        self._began_s = now_s
        self._in_flight = Batch(next(self._batch_ids), tuple(step.items), tuple(step.copies), num_repeats, until_s)
        return self._in_flight

    def on_result(self, result: BatchResult, seconds: float, now_s: float) -> None:
        """Apply a batch that took `seconds`: advance sequences, put tokens out, free what has finished."""
        self._clock.now_s = now_s
        batch, self._in_flight = self._in_flight, None
        assert batch is not None and batch.batch_id == result.batch_id and 1 <= result.num_steps <= batch.num_repeats
        step_seconds = result.step_seconds or [seconds / result.num_steps] * result.num_steps
        self._catch_up(step_seconds)
        for address, outputs in self._results.apply(batch, result, self._began_s, now_s).items():
            self._effects.append(Send(address, Outputs(self.name, outputs)))
        if result.num_steps < batch.num_repeats:
            self._give_steps_back(batch)
        self._requests.sweep(None)
        self._answer_held()
        self._reporter.add_steps(batch, result, step_seconds)
        self._report(now_s)

    def _may_repeat(self, step: Step) -> bool:
        """Whether the next steps are sure to be as this one, and nothing that time may end is under way."""
        scheduler = self.scheduler
        is_steady = not (step.num_prefills or step.num_preempted or step.is_bare) and len(step.items) == len(
            scheduler.decoding
        )
        is_busy = scheduler.prefilling or self._requests.has_limbo or self._held_reserves
        return is_steady and not is_busy and self._sender.is_quiet and self._receiver.quiet_s > 0

    def _steps_within(self, seconds: float) -> int:
        """How many steps will be made in that time, going by the last one: rather too many than too few."""
        return 1 + int(_STEPS_MARGIN * max(0.0, seconds) / max(self._last_step_s, _SHORTEST_STEP_S))

    def _take_steps(self, step: Step, most: int) -> int:
        """Blocks for as many steps as can be foreseen; how many these are."""
        num_steps = foreseen_steps(step.items, most)
        tables = [item.sequence.block_table for item in step.items]
        return self.blocks.grow(tables, [item.start for item in step.items], num_steps)

    def _give_steps_back(self, batch: Batch) -> None:
        """The blocks of steps that were not made."""
        running = [item.sequence for item in batch.items if not item.sequence.is_over]
        lengths = [self.blocks.num_blocks_for(sequence.num_computed) for sequence in running]
        self.blocks.shrink([sequence.block_table for sequence in running], lengths)

    def _catch_up(self, step_seconds: SequenceOf[float]) -> None:
        """The time of the batch has passed, and nobody has ticked between its steps: each ages the reservations."""
        if len(step_seconds) > 1:
            has_incoming = self._receiver.has_incoming
            now_s = self._began_s
            for seconds in step_seconds[:-1]:
                now_s += seconds
                self._clock.stepped(seconds)
                if has_incoming:
                    self._pass_time(now_s)
            self._pass_time(now_s)
        self._last_step_s = step_seconds[-1]
        self._clock.stepped(self._last_step_s)

    def _pass_time(self, now_s: float) -> None:
        elapsed_s = self._clock.elapsed_s(now_s)
        self._sender.tick(elapsed_s)
        self._receiver.tick(elapsed_s)

    # --- out -------------------------------------------------------------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """Everything to be done since the last call, in order."""
        effects, self._effects[:] = list(self._effects), []
        return effects

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def introduction(self, register: Register) -> Register:
        """The same as of now, for a controller that was started again: it has to be told everything once more."""
        self._sender.links.tell_all()
        self._reporter.is_due = True
        return msgspec.structs.replace(
            register,
            role=self.scheduler.role,
            sequence=self._reporter.dispatch_sequence,
            running=self._requests.ids,
            sending=self._sender.ids,
            is_draining=self._orders.is_draining,
        )

    @property
    def is_idle(self) -> bool:
        """Nothing is queued, held, sent or received."""
        is_held = self._requests.has_limbo or self._held_reserves or self._receiver.has_incoming
        return not (self.has_work or is_held) and self._sender.is_idle

    @property
    def load(self) -> InstanceLoad:
        scheduler = self.scheduler
        queued, deferred = scheduler.queued_prompts()
        return InstanceLoad(
            num_waiting=len(scheduler.waiting),
            num_preempted=scheduler.num_waiting_preempted,
            num_prefilling=len(scheduler.prefilling),
            num_decoding=len(scheduler.decoding),
            num_sending=self._sender.num_sending,
            num_receiving=self._receiver.num_incoming,
            waiting_tokens=queued.num_tokens,
            waiting_pairs=queued.num_pairs,
            deferred_tokens=deferred.num_tokens,
            deferred_pairs=deferred.num_pairs,
            decode_context_tokens=scheduler.decode_context_tokens,
            free_blocks=self.blocks.num_free,
            used_blocks=self.blocks.num_blocks - self.blocks.num_free,
            reserved_blocks=self._receiver.num_reserved_blocks,
            quarantined_blocks=self._receiver.num_quarantined_blocks,
        )

    @property
    def counters(self) -> InstanceCounters:
        return self._reporter.counters(
            self._sender.counters, self.scheduler.num_preemptions, self._receiver.num_expired
        )  # fmt: skip

    def check_integrity(self) -> None:
        """Raise AssertionError unless every used block is held by exactly the tables that this instance knows."""
        held = self._requests.block_tables
        held += [sequence.block_table for sequence in self._sender.sending]
        held += [incoming.block_table for incoming in self._receiver.incoming]
        self.blocks.check_integrity(held)

    # --- peers -----------------------------------------------------------------------------------------------------

    def _on_peer_up(self, message: PeerUp) -> None:
        name = message.peer.instance
        if self._peers.is_dead(name) or self._peers.is_up(name):
            return  # a controller that was started again introduces everyone once more
        self._effects.append(Connect(message.peer))
        self._effects += self._peers.up(message.peer)

    def _on_peer_down(self, message: PeerDown) -> None:
        name = message.instance
        backend, may_linger = self._sender.links.backend(name), False
        if (peer := self._peers.down(name)) is not None:
            self._effects.append(Disconnect(peer))
            may_linger = may_outlive_writer(backend, peer.pool)
        self._sender.on_peer_down(name)
        self._receiver.on_peer_down(name, may_linger)

    def _hear_source(self, message: Reserve | KvReady | Renew | CancelAck) -> None:
        match message:
            case Reserve() if self._config.max_segments and self._in_flight is not None:
                self._held_reserves.append(message)  # what the step reads and writes cannot move
            case Reserve():
                self._receiver.on_reserve(message, self._has_room(message))
            case KvReady():
                self._receiver.on_ready(message)
            case Renew():
                self._receiver.on_renew(message)
            case CancelAck():
                self._receiver.on_cancel_ack(message)

    def _answer_held(self) -> None:
        held, self._held_reserves = self._held_reserves, []
        for message in held:
            self._hear_source(message)

    def _hear_receiver(self, message: Reserved | Refused | Renewed | Release | Cancel) -> None:
        self._sender.heard(message.instance, message.lease_s if isinstance(message, Renewed) else 0.0)
        match message:
            case Reserved():
                self._peers.check_blocks(message.instance, message.block_ids)
                self._sender.on_reserved(message)
            case Refused():
                self._sender.on_refused(message)
            case Release():
                self._on_release(message)
            case Cancel():
                self._sender.on_cancel(message)

    def _on_release(self, message: Release) -> None:
        sequence = self._sender.on_release(message)
        if sequence is not None:
            self._requests.hold(sequence)
            self._reporter.handed_over(message.request_id, message.instance)
            self._requests.sweep(self._in_flight)

    def _decode_here(self, sequence: Sequence, choices: OutputIds) -> None:
        """No peer takes it: the controller, who thinks that one does, is to know where it is."""
        self._reporter.handed_over(sequence.request.request_id, self.name)
        self._requests.decode(sequence, choices)

    def _adopt(self, incoming: Incoming) -> None:
        """The controller hears it from both sides: either may die, or be stopped, before it could say so."""
        self._reporter.handed_over(incoming.reserve.request.request_id, self.name)
        self._requests.adopt(incoming)

    def _has_room(self, message: Reserve) -> bool:
        """Whether a request may come: room for its choices beside those running, and a block of growth for each."""
        n = message.request.sampling.n
        num_choices = len(self.scheduler.decoding) + self._receiver.num_choices + n
        needed = self.blocks.num_blocks_for(len(message.request.prompt_ids)) + num_choices
        if self.scheduler.waiting:  # those who wait here come first, or newcomers would take every block that is freed
            needed += self.blocks.num_blocks_for(self.scheduler.waiting[0].num_tokens)
        longest = self.blocks.num_blocks_for(message.request.max_total_tokens)
        fits = needed <= self.blocks.num_free and longest <= self.blocks.num_blocks
        return fits and num_choices <= self._config.max_choices and not self._orders.is_draining

    def _allocate_together(self, num_blocks: int) -> list[int] | None:
        """Blocks for a peer to fill, in few segments: requests that decode here have no use for lying together."""
        movable = [s.block_table for s in self.scheduler.decoding if not self._sender.is_pinned(s)]
        opened = self.blocks.allocate_within(num_blocks, self._config.max_segments, movable)
        if opened is None:
            return None
        blocks, copies = opened
        if copies:
            self._reporter.num_moved_blocks += len(copies)
            self._effects.append(MoveBlocks(tuple(copies)))
        return blocks

    def _break_standstill(self) -> None:
        """Prompts wait for blocks that only peers hold, who may be waiting for each other: let one of them go."""
        scheduler = self.scheduler
        is_busy = scheduler.prefilling or scheduler.decoding or self._requests.has_limbo or self._sender.num_sending
        if scheduler.waiting and not is_busy:
            self._receiver.revoke_youngest()

    # --- effects ---------------------------------------------------------------------------------------------------

    def _send_peer(self, instance: str, message: Message) -> None:
        self._effects += self._peers.send(instance, message)

    def _report(self, now_s: float) -> None:
        if self._orders.is_draining and not self._has_drained and self.is_idle:
            self._reporter.is_due = self._has_drained = True
        report = self._reporter.report(now_s, self._state)
        if report is not None:
            self._effects.append(report)

    def _state(self) -> State:
        return State(
            self.scheduler.role,
            self.load,
            self.counters,
            self._sender.links.take_changed(),
            self._sender.unanswered,
            self._has_drained,
        )
