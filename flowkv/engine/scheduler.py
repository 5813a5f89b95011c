"""What an instance computes next: a prefill queue and a decode queue over one pool of blocks."""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from flowkv.config import EngineConfig, prefill_budget, step_bound_s
from flowkv.cost import LearntCost, prefill_pairs
from flowkv.engine.batch import BatchItem
from flowkv.engine.sequence import Sequence
from flowkv.kv.blocks import BlockCopy, BlockManager
from flowkv.types import Role

# Then a step decodes alone, where chunks are sized by what that costs: it must not be forgotten.
_MOST_SHARED = 100


class HybridScheduler:
    """FlowKV's hybrid scheduler (section on load-aware scheduling): both phases everywhere, the role says which first.

    Every running decode is in every step. Prompts are computed in chunks that share what is left of the step's prefill
    budget, lowest priority number and then oldest first; a prompt gets all of its blocks when it starts, so it lies in
    as few segments as possible and never stops half-way for want of room. When a decode cannot grow, the youngest
    sequence that may be stopped is preempted: its blocks are dropped and its ids computed again later.

    `is_pinned` tells which sequences must keep their blocks for now (a peer is being sent them). Where `max_itl_s` is
    set, a step that decodes gets as many prompt tokens as keep it so short, by what `cost` has learnt of steps so far.
    """

    def __init__(
        self, config: EngineConfig, blocks: BlockManager, role: Role, max_itl_s: float | None = None
    ) -> None:  # fmt: skip
        self.role = role
        self.config = config
        self.blocks = blocks
        self.cost = LearntCost()
        self.waiting: list[Sequence] = []  # by priority, then arrival
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []  # by arrival
        self.num_waiting_preempted = 0
        self.num_preemptions = 0
        self.is_pinned: Callable[[Sequence], bool] = lambda sequence: False
        self._max_itl_s = max_itl_s
        self._num_shared = 0  # steps with decodes and chunks since the last with decodes alone
        self._waiting_prompts = Prompts()
        self._deferred_prompts = Prompts()  # waiting: of requests that let all others pass

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.decoding)

    def queued_prompts(self) -> tuple["Prompts", "Prompts"]:
        """What is to be computed before the prompt of a request that comes now, and what lets that pass."""
        waiting, deferred = self._waiting_prompts, self._deferred_prompts
        queued = Prompts(waiting.num_tokens, waiting.num_pairs)
        passed = Prompts(deferred.num_tokens, deferred.num_pairs)
        for sequence in self.prefilling:
            prompts = passed if sequence.request.is_deferred else queued
            num_uncomputed = sequence.num_uncomputed
            prompts.num_tokens += num_uncomputed
            prompts.num_pairs += prefill_pairs(sequence.num_computed, num_uncomputed)
        return queued, passed

    @property
    def decode_context_tokens(self) -> int:
        """KV slots that one step of the decode queue reads."""
        return sum(s.num_computed for s in self.decoding) + len(self.decoding)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for prefill, by its priority and arrival."""
        sequence.is_decoding = False
        insort(self.waiting, sequence, key=_order)
        (self._deferred_prompts if sequence.request.is_deferred else self._waiting_prompts).add(sequence)
        self.num_waiting_preempted += sequence.has_begun

    def start_decoding(self, sequence: Sequence) -> None:
        """Take a sequence whose last token alone is not computed yet."""
        sequence.is_decoding = sequence.has_begun = True
        insort(self.decoding, sequence, key=lambda s: s.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue; its blocks stay with it."""
        if sequence.is_decoding:
            self.decoding.remove(sequence)
        elif sequence in self.prefilling:
            self.prefilling.remove(sequence)
        else:
            self.waiting.remove(sequence)
            self._no_longer_waits(sequence)

    def schedule(self) -> "Step":
        """The next step; it is empty when nothing can run."""
        step = Step()
        if self.role is Role.PREFILL:
            self._schedule_prefills(step)
            self._schedule_decodes(step)
        else:
            self._schedule_decodes(step)
            self._schedule_prefills(step)
        return step

    def _schedule_prefills(self, step: "Step") -> None:
        if not self.prefilling and not self.waiting:
            return
        if self._num_shared == _MOST_SHARED and self.decoding:
            self._num_shared, step.is_bare = 0, True
            return
        budget = self._prefill_budget()
        deferred = [s for s in self.prefilling if s.request.is_deferred]
        for sequence in self.prefilling:
            if not sequence.request.is_deferred:
                budget -= self._add_chunk(step, sequence, budget)
        while budget >= self.blocks.block_size and self.waiting and self._start_next(bool(deferred)):
            budget -= self._add_chunk(step, self.prefilling[-1], budget)
        for sequence in deferred:
            budget -= self._add_chunk(step, sequence, budget)
        if self._max_itl_s is not None and self.decoding and step.num_prefills:
            self._num_shared += 1

    def _start_next(self, has_deferred: bool) -> bool:
        """The first that waits; one that lets others pass only where no such one has begun."""
        first = self.waiting[0]
        return not (has_deferred and first.request.is_deferred) and self._start(first)

    def _prefill_budget(self) -> int:
        """Prompt tokens of this step: the role's share, or what fits into the bound on ITL beside the decodes; that
        also where none runs, but one may be handed over at any time.

        That is whole blocks, and at least one: prompts go on however tight the bound is.
        """
        if self._max_itl_s is None or (self.role is Role.PREFILL and not self.decoding):
            config = self.config
            return prefill_budget(config.max_batch_tokens, config.block_size, self.role, len(self.decoding))
        start = self.prefilling[0].num_computed if self.prefilling else 0
        bound_s = step_bound_s(self._max_itl_s, self.role)
        num_tokens = self.cost.max_prefill_tokens(
            bound_s, len(self.decoding), self.decode_context_tokens, start
        )  # fmt: skip
        size = self.blocks.block_size
        return max(size, min(num_tokens - num_tokens % size, self.config.max_batch_tokens))

    def _start(self, sequence: Sequence) -> bool:
        """Move the first waiting sequence on, if its whole prompt and a step of every decode fit beside each other."""
        num_running = len(self.decoding) + len(self.prefilling)
        if num_running >= self.config.max_choices:
            return False
        headroom = len(self.decoding)
        if self.blocks.num_blocks_for(sequence.num_tokens) + headroom > self.blocks.num_free:
            return False
        copies = self.blocks.prepare_write(sequence.block_table, 0, sequence.num_tokens)
        assert copies == []
        self._no_longer_waits(self.waiting.pop(0))
        sequence.has_begun = True
        self.prefilling.append(sequence)
        return True

    def _no_longer_waits(self, sequence: Sequence) -> None:
        (self._deferred_prompts if sequence.request.is_deferred else self._waiting_prompts).remove(sequence)
        self.num_waiting_preempted -= sequence.has_begun

    def _add_chunk(self, step: "Step", sequence: Sequence, budget: int) -> int:
        """The next chunk of a prompt within `budget` tokens; all but the last end on a block boundary."""
        num_tokens = num_uncomputed = sequence.num_uncomputed
        if budget < num_uncomputed:
            stop = sequence.num_computed + budget
            num_tokens = max(0, stop - stop % self.blocks.block_size - sequence.num_computed)
        if num_tokens == 0:
            return 0
        is_last = num_tokens == num_uncomputed
        draws = range(sequence.choice, sequence.choice + sequence.num_choices)
        wanted = is_last and sequence.request.sampling.max_tokens > 0
        step.items.append(BatchItem(sequence, sequence.num_computed, num_tokens, tuple(draws) if wanted else ()))
        step.num_prefills += 1
        if sequence.num_computed == 0:
            step.begun.append(sequence)
        return num_tokens

    def _schedule_decodes(self, step: "Step") -> None:
        prepare_slot, items = self.blocks.prepare_slot, step.items
        for sequence in self.decoding[:]:  # some may be preempted on the way
            if not sequence.block_table:
                continue
            copies = prepare_slot(sequence.block_table, sequence.num_computed)
            if copies is None:
                copies = self._make_room(step, sequence)
            if copies is None:
                continue
            if copies:
                step.copies += copies
            items.append(BatchItem(sequence, sequence.num_computed, 1, (sequence.choice,)))

    def _make_room(self, step: "Step", sequence: Sequence) -> list[BlockCopy] | None:
        """Let a decode write its next slot by preempting younger sequences; None if it has to sit out."""
        while (victim := self._victim(step)) is not None:
            self._preempt(victim)
            step.num_preempted += 1
            if victim is sequence:
                return None
            position = sequence.num_computed
            copies = self.blocks.prepare_write(sequence.block_table, position, position + 1)
            if copies is not None:
                return copies
        return None

    def _victim(self, step: "Step") -> Sequence | None:
        """The youngest sequence that is not in this step yet and not pinned; of the phase that goes second, if any."""
        taken = {id(item.sequence) for item in step.items}
        queues = [self.prefilling, self.decoding]
        for queue in reversed(queues) if self.role is Role.PREFILL else queues:
            candidates = [s for s in queue if s.block_table and id(s) not in taken and not self.is_pinned(s)]
            if candidates:
                return max(candidates, key=lambda s: s.arrival)
        return None

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        self.blocks.free(sequence.block_table)
        sequence.num_computed = 0
        sequence.prompt_logprobs = []
        self.num_preemptions += 1
        self.add(sequence)


class Step:
    """One step as `HybridScheduler.schedule` puts it together. `copies` are to be made before it."""

    __slots__ = ("begun", "copies", "is_bare", "items", "num_preempted", "num_prefills")

    def __init__(self) -> None:
        self.items: list[BatchItem] = []
        self.copies: list[BlockCopy] = []
        self.begun: list[Sequence] = []  # those of which this is the first chunk
        self.num_prefills = 0  # items
        self.num_preempted = 0
        self.is_bare = False  # prompts could have had a chunk in it


@dataclass(slots=True)
class Prompts:
    """How much there is to compute: tokens, and pairs of a token and a position that it attends to."""

    num_tokens: int = 0
    num_pairs: int = 0

    def add(self, sequence: Sequence) -> None:
        self.num_tokens += sequence.num_tokens
        self.num_pairs += prefill_pairs(0, sequence.num_tokens)

    def remove(self, sequence: Sequence) -> None:
        self.num_tokens -= sequence.num_tokens
        self.num_pairs -= prefill_pairs(0, sequence.num_tokens)


def _order(sequence: Sequence) -> tuple[int, int]:
    return (sequence.request.priority, sequence.arrival)
