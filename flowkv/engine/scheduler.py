"""What an instance computes next: a prefill queue and a decode queue over one pool of blocks."""

from bisect import insort
from collections.abc import Callable

from flowkv.config import EngineConfig
from flowkv.engine.batch import BatchItem
from flowkv.engine.sequence import Sequence
from flowkv.kv.blocks import BlockCopy, BlockManager
from flowkv.types import Role


class HybridScheduler:
    """FlowKV's hybrid scheduler (section on load-aware scheduling): both phases everywhere, the role says which first.

    Every running decode is in every step. Prompts are computed in chunks that share what is left of the role's
    prefill budget, oldest first; a prompt gets all of its blocks when it starts, so it lies in as few segments as
    possible and never stops half-way for want of room. When a decode cannot grow, the youngest sequence that may be
    stopped is preempted: its blocks are dropped and its ids computed again later.

    `is_pinned` tells which sequences must keep their blocks for now (a peer is being sent them).
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager, role: Role) -> None:
        self.role = role
        self.config = config
        self.blocks = blocks
        self.waiting: list[Sequence] = []  # by arrival
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.num_preemptions = 0
        self.is_pinned: Callable[[Sequence], bool] = lambda sequence: False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.decoding)

    @property
    def waiting_tokens(self) -> int:
        return sum(s.num_uncomputed for s in self.waiting) + sum(s.num_uncomputed for s in self.prefilling)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence for prefill, by its arrival."""
        sequence.is_decoding = False
        insort(self.waiting, sequence, key=lambda s: s.arrival)

    def start_decoding(self, sequence: Sequence) -> None:
        """Take a sequence whose last token alone is not computed yet."""
        sequence.is_decoding = True
        self.decoding.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue; its blocks stay with it."""
        for queue in (self.decoding, self.prefilling, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
                return

    def schedule(self) -> tuple[list[BatchItem], list[BlockCopy]]:
        """The items of the next step, and the block copies to make before it. Empty when nothing can run."""
        step = _Step()
        phases = [self._schedule_prefills, self._schedule_decodes]
        for schedule_phase in phases if self.role is Role.PREFILL else reversed(phases):
            schedule_phase(step)
        return step.items, step.copies

    def _schedule_prefills(self, step: "_Step") -> None:
        budget = self.config.prefill_budget(self.role, len(self.decoding))
        for sequence in self.prefilling:
            budget -= self._add_chunk(step, sequence, budget)
        while budget >= self.blocks.block_size and self.waiting and self._start(self.waiting[0]):
            budget -= self._add_chunk(step, self.prefilling[-1], budget)

    def _start(self, sequence: Sequence) -> bool:
        """Move the oldest waiting sequence on, if its whole prompt and a step of every decode fit beside each other."""
        num_running = len(self.decoding) + len(self.prefilling)
        if num_running >= self.config.max_choices:
            return False
        headroom = len(self.decoding)
        if self.blocks.num_blocks_for(sequence.num_tokens) + headroom > self.blocks.num_free:
            return False
        copies = self.blocks.prepare_write(sequence.block_table, 0, sequence.num_tokens)
        assert copies == []
        self.waiting.pop(0)
        self.prefilling.append(sequence)
        return True

    def _add_chunk(self, step: "_Step", sequence: Sequence, budget: int) -> int:
        """The next chunk of a prompt within `budget` tokens; all but the last end on a block boundary."""
        num_tokens = min(budget, sequence.num_uncomputed)
        if num_tokens < sequence.num_uncomputed:
            stop = sequence.num_computed + num_tokens
            num_tokens = max(0, stop - stop % self.blocks.block_size - sequence.num_computed)
        if num_tokens == 0:
            return 0
        is_last = num_tokens == sequence.num_uncomputed
        draws = range(sequence.choice, sequence.choice + sequence.num_choices)
        wanted = is_last and sequence.request.sampling.max_tokens > 0
        step.items.append(BatchItem(sequence, sequence.num_computed, num_tokens, tuple(draws) if wanted else ()))
        return num_tokens

    def _schedule_decodes(self, step: "_Step") -> None:
        for sequence in sorted(self.decoding, key=lambda s: s.arrival):
            if sequence.block_table and self._make_room(step, sequence):
                step.items.append(BatchItem(sequence, sequence.num_computed, 1, (sequence.choice,)))

    def _make_room(self, step: "_Step", sequence: Sequence) -> bool:
        """Let a decode write its next slot, preempting younger sequences if it must; False if it has to sit out."""
        while True:
            copies = self.blocks.prepare_write(sequence.block_table, sequence.num_computed, sequence.num_computed + 1)
            if copies is not None:
                step.copies += copies
                return True
            victim = self._victim(step)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False

    def _victim(self, step: "_Step") -> Sequence | None:
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


class _Step:
    """What `schedule` has put together so far."""

    def __init__(self) -> None:
        self.items: list[BatchItem] = []
        self.copies: list[BlockCopy] = []
