"""One instance as a state machine: messages and the time go in, batches and effects come out. No I/O, no torch.

A step is two calls: `next_batch` gives what to compute, `on_result` takes what came of it. In between, messages may be
handled; blocks that the batch in flight writes are not given to anyone else before its result is in.
"""

from itertools import count

from flowkv.config import EngineConfig, TransferConfig
from flowkv.engine.batch import Batch, BatchItem, BatchResult, ItemResult
from flowkv.engine.effects import Connect, Disconnect, Effect, MoveBlocks, Send
from flowkv.engine.handoff_receiver import HandoffReceiver, Incoming
from flowkv.engine.handoff_sender import HandoffSender
from flowkv.engine.leases import LeaseClock
from flowkv.engine.peers import Peers
from flowkv.engine.report import Reporter, State
from flowkv.engine.scheduler import HybridScheduler
from flowkv.engine.sequence import Sequence
from flowkv.errors import ProtocolError
from flowkv.kv.blocks import BlockManager
from flowkv.messages import (
    Abort,
    Cancel,
    CancelAck,
    Dispatch,
    KvReady,
    Message,
    Outputs,
    PeerDown,
    PeerUp,
    Refused,
    Release,
    Renew,
    Renewed,
    Reserve,
    Reserved,
)
from flowkv.transfer.backends import may_outlive_writer
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.types import NO_TOKEN, FinishReason, InstanceCounters, InstanceLoad, Output, Role, TokenLogprobs


class Engine:
    """The requests, the blocks and the handoffs of one instance."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        num_blocks: int,
        role: Role,
        controller_address: str,
        lease_s: float = TransferConfig().lease_s,
    ) -> None:
        self.name = name
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.scheduler = HybridScheduler(config, self.blocks, role)
        self._config = config
        self._effects: list[Effect] = []
        self._peers = Peers()
        self._sequences: dict[str, list[Sequence]] = {}  # in the scheduler's queues, by request
        self._arrivals = count()
        self._batch_ids = count(1)
        self._in_flight: Batch | None = None
        self._limbo: list[Sequence] = []  # over, but their blocks are still being written or read
        self._held_reserves: list[Reserve] = []  # until the step in flight is over
        self._reporter = Reporter(name, controller_address)
        self._clock = LeaseClock(lease_s)
        send, emit = self._send_peer, self._effects.append
        self._sender = HandoffSender(name, config.block_size, self._clock, send, emit, self._decode_here)
        self._receiver = HandoffReceiver(name, self.blocks, self._clock, send, emit, self._adopt)
        self.scheduler.is_pinned = self._sender.is_pinned
        if config.max_segments:
            self._receiver.allocate = self._allocate_together

    # --- in --------------------------------------------------------------------------------------------------------

    def handle(self, message: Message, now_s: float) -> None:
        """One message. ProtocolError for one that no instance should ever get."""
        match message:
            case Dispatch():
                self._on_dispatch(message)
            case Abort():
                self._on_abort(message)
            case Reserve() | KvReady() | Renew() | CancelAck():
                self._hear_source(message)
            case Reserved() | Refused() | Renewed() | Release() | Cancel():
                self._hear_receiver(message)
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
        self._sweep()
        self._report(now_s)

    def on_arrived(self, arrived: Arrived, now_s: float) -> None:
        """A peer has written blocks into this instance's pool."""
        self._receiver.on_arrived(arrived)
        self._report(now_s)

    def next_batch(self, now_s: float) -> Batch | None:
        """What to compute now, or None if there is nothing to do before the next message."""
        assert self._in_flight is None, "the result of the last batch is not in yet"
        items, copies = self.scheduler.schedule()
        if not items:
            self._break_standstill()
            return None
        for item in items:
            if item.start == 0:
                self._sender.start(item.sequence)
        self._in_flight = Batch(next(self._batch_ids), tuple(items), tuple(copies))
        return self._in_flight

    def on_result(self, result: BatchResult, seconds: float, now_s: float) -> None:
        """Apply a step that took `seconds`: advance sequences, put tokens out, free what has finished."""
        batch, self._in_flight = self._in_flight, None
        assert batch is not None and batch.batch_id == result.batch_id
        outputs: dict[str, list[Output]] = {}
        for item, item_result in zip(batch.items, result.items, strict=True):
            if item.sequence not in self._limbo:
                self._apply(item, item_result, outputs, now_s)
        for address, items in outputs.items():
            self._effects.append(Send(address, Outputs(self.name, items)))
        self._sweep()
        self._answer_held()
        self._clock.stepped(seconds)
        self._reporter.add_step(batch, result, seconds)
        self._report(now_s)

    def tick(self, now_s: float) -> None:
        """Called between steps, and at a slow beat while idle, when all messages and completions have been handled."""
        elapsed_s = self._clock.elapsed_s(now_s)
        self._sender.tick(elapsed_s)
        self._receiver.tick(elapsed_s)
        self._report(now_s)

    # --- out -------------------------------------------------------------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """Everything to be done since the last call, in order."""
        effects, self._effects[:] = list(self._effects), []
        return effects

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def is_idle(self) -> bool:
        """Nothing is queued, held, sent or received."""
        return (
            not (self.has_work or self._limbo or self._held_reserves or self._receiver.incoming)
            and self._sender.is_idle
        )

    @property
    def load(self) -> InstanceLoad:
        scheduler = self.scheduler
        return InstanceLoad(
            num_waiting=len(scheduler.waiting),
            num_prefilling=len(scheduler.prefilling),
            num_decoding=len(scheduler.decoding),
            num_sending=self._sender.num_sending,
            num_receiving=len(self._receiver.incoming),
            waiting_tokens=scheduler.waiting_tokens,
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
        held = [s.block_table for sequences in self._sequences.values() for s in sequences]
        held += [s.block_table for s in [*self._limbo, *self._sender.sending]]
        held += [incoming.block_table for incoming in self._receiver.incoming]
        self.blocks.check_integrity(held)

    # --- requests --------------------------------------------------------------------------------------------------

    def _on_dispatch(self, message: Dispatch) -> None:
        request = message.request
        self._reporter.dispatch_sequence = message.sequence
        if self.blocks.num_blocks_for(request.max_total_tokens) > self.blocks.num_blocks:
            self._fail(message, f"the request may need more than the {self.blocks.num_blocks} blocks of {self.name}")
            return
        sequence = Sequence(
            request, message.attempt, message.frontend_address, next(self._arrivals), num_choices=request.sampling.n
        )
        self._sequences[request.request_id] = [sequence]
        self.scheduler.add(sequence)
        if message.decode_instances:
            self._sender.expect(sequence, list(message.decode_instances))

    def _fail(self, message: Dispatch, reason: str) -> None:
        request_id = message.request.request_id
        outputs = [
            Output(request_id, choice, message.attempt, 0, [], FinishReason.ERROR, error=reason)
            for choice in range(message.request.sampling.n)
        ]
        self._effects.append(Send(message.frontend_address, Outputs(self.name, outputs)))
        self._reporter.finished.append(request_id)

    def _on_abort(self, message: Abort) -> None:
        request_id = message.request_id
        self._receiver.abort(request_id, message.choice)
        if message.choice is None:
            held = self._sender.give_up(request_id)
        else:
            held = self._sender.drop_choice(request_id, message.choice)
        if held is not None:
            self._limbo.append(held)
            self._reporter.finished.append(request_id)
        for sequence in list(self._sequences.get(request_id, ())):
            if message.choice is None or (sequence.num_choices == 1 and sequence.choice == message.choice):
                self._retire(sequence)
        self._sweep()

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
            self._limbo.append(sequence)
            self._reporter.handed_over.append((message.request_id, message.instance))
            self._sweep()

    def _on_peer_up(self, message: PeerUp) -> None:
        if self._peers.is_dead(message.peer.instance):
            return
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

    def _adopt(self, incoming: Incoming) -> None:
        """A request whose prompt was computed elsewhere is ours, with its blocks.

        The controller hears it from both sides: either may die, or be stopped, before it could say so.
        """
        reserve = incoming.reserve
        self._reporter.handed_over.append((reserve.request.request_id, self.name))
        sequence = Sequence(
            reserve.request,
            reserve.request_attempt,
            reserve.frontend_address,
            next(self._arrivals),
            num_computed=len(reserve.request.prompt_ids),
            block_table=incoming.block_table,
        )
        self._decode_here(sequence, incoming.choices)

    def _decode_here(self, root: Sequence, choices: dict[int, list[int]]) -> None:
        """Fork a computed prompt into the choices that run on; `root` gives its blocks up to them."""
        request_id = root.request.request_id
        forks = []
        for choice, output_ids in choices.items():
            fork = Sequence(
                root.request,
                root.attempt,
                root.frontend_address,
                root.arrival,
                choice=choice,
                output_ids=list(output_ids),
                num_computed=root.num_computed,
                block_table=self.blocks.fork(root.block_table),
            )
            self.scheduler.start_decoding(fork)
            forks.append(fork)
        self.blocks.free(root.block_table)
        if forks:
            self._sequences[request_id] = forks
        else:
            self._reporter.finished.append(request_id)

    def _retire(self, sequence: Sequence) -> None:
        """Out of the queues; its blocks go once nobody writes or reads them."""
        request_id = sequence.request.request_id
        self.scheduler.remove(sequence)
        self._limbo.append(sequence)
        self._sequences[request_id].remove(sequence)
        if not self._sequences[request_id]:
            del self._sequences[request_id]
            self._reporter.finished.append(request_id)

    def _sweep(self) -> None:
        """Free the blocks of what is over and no longer in use."""
        if not self._limbo:
            return
        computing = {id(item.sequence) for item in self._in_flight.items} if self._in_flight else set()
        waiting = [s for s in self._limbo if id(s) in computing or self._sender.is_pinned(s)]
        for sequence in self._limbo:
            if sequence not in waiting:
                self.blocks.free(sequence.block_table)
        self._limbo = waiting

    def _has_room(self, message: Reserve) -> bool:
        """Whether a request may come: room for its choices beside those running, and a block of growth for each."""
        n = message.request.sampling.n
        num_choices = len(self.scheduler.decoding) + self._receiver.num_choices + n
        needed = self.blocks.num_blocks_for(len(message.request.prompt_ids)) + num_choices
        if self.scheduler.waiting:  # those who wait here come first, or newcomers would take every block that is freed
            needed += self.blocks.num_blocks_for(self.scheduler.waiting[0].num_tokens)
        longest = self.blocks.num_blocks_for(message.request.max_total_tokens)
        fits = needed <= self.blocks.num_free and longest <= self.blocks.num_blocks
        return fits and num_choices <= self._config.max_choices

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
        is_busy = scheduler.prefilling or scheduler.decoding or self._limbo or self._sender.num_sending
        if scheduler.waiting and not is_busy:
            self._receiver.revoke_youngest()

    # --- results ---------------------------------------------------------------------------------------------------

    def _apply(self, item: BatchItem, result: ItemResult, outputs: dict[str, list[Output]], now_s: float) -> None:
        sequence = item.sequence
        sequence.num_computed = item.stop
        sequence.prompt_logprobs += result.prompt_logprobs
        if sequence.is_decoding:
            self._apply_decode(sequence, result, outputs)
        elif sequence.num_uncomputed == 0:
            self._apply_prefill(item, result, outputs, now_s)
        else:
            self._sender.chunk_computed(sequence)

    def _apply_decode(self, sequence: Sequence, result: ItemResult, outputs: dict[str, list[Output]]) -> None:
        output = self._append_token(sequence, sequence.choice, sequence.output_ids, result, 0)
        outputs.setdefault(sequence.frontend_address, []).append(output)
        if output.finish_reason is not None:
            self._retire(sequence)

    def _apply_prefill(
        self, item: BatchItem, result: ItemResult, outputs: dict[str, list[Output]], now_s: float
    ) -> None:
        """A prompt (and what a preempted choice had put out) is computed: the next tokens go out from here."""
        sequence = item.sequence
        choices: dict[int, list[int]] = {}
        mine = outputs.setdefault(sequence.frontend_address, [])
        for i, choice in enumerate(item.draws):
            output_ids = list(sequence.output_ids)
            output = self._append_token(sequence, choice, output_ids, result, i)
            mine.append(output)
            if output.finish_reason is None:
                choices[choice] = output_ids
        if not item.draws:  # max_tokens is 0: the prompt was all there was to compute
            mine.extend(self._empty_output(sequence, choice) for choice in range(sequence.num_choices))
        self._move_on(sequence, choices, now_s)

    def _move_on(self, sequence: Sequence, choices: dict[int, list[int]], now_s: float) -> None:
        if not choices:
            self._sender.takes(sequence, choices, now_s)
            self._retire(sequence)
            return
        self.scheduler.remove(sequence)
        siblings = self._sequences.pop(sequence.request.request_id)
        if self._sender.takes(sequence, choices, now_s):
            return
        self._decode_here(sequence, choices)
        siblings.remove(sequence)
        self._sequences[sequence.request.request_id] += siblings

    def _append_token(
        self, sequence: Sequence, choice: int, output_ids: list[int], result: ItemResult, draw_index: int
    ) -> Output:
        """Add a drawn token to a choice and say what the client gets."""
        draw = result.draws[draw_index]
        sampling = sequence.request.sampling
        index = len(output_ids)
        if draw.token_id == NO_TOKEN:
            text = "no token could be drawn: the logits were NaN or infinite, or every token was masked"
            request_id = sequence.request.request_id
            return Output(request_id, choice, sequence.attempt, index, [], FinishReason.ERROR, error=text)
        output_ids.append(draw.token_id)
        finish_reason, stop_token_id = None, None
        if draw.token_id in sampling.stop_token_ids:
            finish_reason, stop_token_id = FinishReason.STOP, draw.token_id
        elif len(output_ids) >= sampling.max_tokens:
            finish_reason = FinishReason.LENGTH
        return Output(
            sequence.request.request_id,
            choice,
            sequence.attempt,
            index,
            [draw.token_id],
            finish_reason,
            stop_token_id,
            None if draw.logprobs is None else [draw.logprobs],
            self._prompt_logprobs(sequence) if index == 0 and choice == 0 else None,
        )

    def _empty_output(self, sequence: Sequence, choice: int) -> Output:
        logprobs = self._prompt_logprobs(sequence) if choice == 0 else None
        request_id = sequence.request.request_id
        reason = FinishReason.LENGTH
        return Output(request_id, choice, sequence.attempt, 0, [], reason, prompt_logprobs=logprobs)

    def _prompt_logprobs(self, sequence: Sequence) -> list[TokenLogprobs] | None:
        return None if sequence.request.sampling.prompt_logprobs is None else sequence.prompt_logprobs

    # --- effects ---------------------------------------------------------------------------------------------------

    def _send_peer(self, instance: str, message: Message) -> None:
        self._effects += self._peers.send(instance, message)

    def _report(self, now_s: float) -> None:
        report = self._reporter.report(now_s, self._state)
        if report is not None:
            self._effects.append(report)

    def _state(self) -> State:
        return State(self.load, self.counters, self._sender.links.statuses(), self._sender.unanswered)
