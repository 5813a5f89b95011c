"""Which steps are measured, and how an instance is brought to make them."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

from benchmarks import BenchmarkError
from benchmarks.engine.clocks import timing
from benchmarks.engine.instance import WAIT_S, Instance, Others, Step
from flowkv.config import EngineConfig
from flowkv.model.loading import LoadedModel
from flowkv.types import Request, SamplingParams

DECODE, PREFILL = "decode", "prefill"
WARMUP_STEPS = 3  # before those of a cell that count
SPARE_TOKENS = 32  # of a choice beyond the steps that are made: none must end

OnDone = Callable[[], None]


class Cell(NamedTuple):
    phase: str
    size: int  # choices that decode, or tokens of the chunk
    context: int  # tokens of each choice, or before the chunk


@dataclass(frozen=True, slots=True)
class Plan:
    """`num_steps` of each cell in each of `num_rounds`, which take the cells in different orders."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    num_rounds: int
    num_steps: int
    max_cell_tokens: int

    def decode_cells(self, max_model_tokens: int) -> tuple[list[Cell], list[Cell]]:
        """Those to measure, and those left out: too much KV, or more than the model's longest request."""
        cells = [Cell(DECODE, batch, context) for batch, context in product(self.batches, self.contexts)]
        wanted = [cell for cell in cells if self._fits(cell, max_model_tokens)]
        return wanted, [cell for cell in cells if cell not in wanted]

    def prefill_cells(self, chunk: int, max_model_tokens: int) -> list[Cell]:
        """Chunks begin where chunks before them end."""
        starts = {0, *(context - context % chunk for context in self.contexts)}
        return [Cell(PREFILL, chunk, start) for start in sorted(starts) if start + chunk <= max_model_tokens]

    @property
    def num_decoded(self) -> int:
        """Tokens that a choice may grow by in a cell."""
        return WARMUP_STEPS + self.num_steps + SPARE_TOKENS

    def _fits(self, cell: Cell, max_model_tokens: int) -> bool:
        longest = cell.context + WARMUP_STEPS + self.num_steps
        return cell.size * cell.context <= self.max_cell_tokens and longest <= max_model_tokens


def num_blocks_for(cells: Sequence[Cell], num_decoded: int, block_size: int) -> int:
    """Blocks of a pool that holds each of them, one at a time, and one more for each choice (`Engine` asks that)."""

    def blocks(cell: Cell) -> int:
        grown = cell.context + (num_decoded if cell.phase == DECODE else cell.size)
        return (cell.size if cell.phase == DECODE else 1) * (-(-grown // block_size) + 1)

    return max(map(blocks, cells))


class Bench:
    """Measures cells on one instance, one after the other."""

    def __init__(self, instance: Instance, others: Others, vocab_size: int) -> None:
        self._instance = instance
        self._others = others
        self._vocab_size = vocab_size
        self._names = count(1)
        self._random = random.Random(0)

    def decode(self, cell: Cell, num_steps: int, num_decoded: int) -> list[Step]:
        instance, scheduler = self._instance, self._instance.engine.scheduler
        requests = [self._request(cell.context, num_decoded) for _ in range(cell.size)]
        for request in requests:
            self._others.hand_over(request)
        instance.wait_until(lambda: len(scheduler.decoding) == cell.size)
        steps = [instance.step() for _ in range(WARMUP_STEPS + num_steps)][WARMUP_STEPS:]
        for request in requests:
            self._others.abort(request)
        instance.wait_until(lambda: instance.engine.is_idle)
        self._others.take()
        if any(step.num_items != cell.size for step in steps):
            raise BenchmarkError(f"not every choice decoded in every step of {cell}")
        return steps

    def prefill(self, cells: Sequence[Cell]) -> dict[Cell, Step]:
        """One prompt, whose chunks are all of these cells."""
        instance = self._instance
        self._others.dispatch(self._request(cells[-1].context + cells[-1].size, 1))
        instance.wait_message(time.monotonic() + WAIT_S)
        steps = [instance.step()]
        while instance.engine.has_work:
            steps.append(instance.step())
        self._others.take()
        by_start = {step.start: step for step in steps}
        return {cell: by_start[cell.context] for cell in cells}

    def _request(self, num_tokens: int, num_outputs: int) -> Request:
        prompt_ids = self._random.choices(range(self._vocab_size), k=num_tokens)
        sampling = SamplingParams(max_tokens=num_outputs, temperature=0.0)
        return Request(request_id=f"request-{next(self._names)}", prompt_ids=prompt_ids, sampling=sampling)


def check_attention(steps: Iterable[Step]) -> None:
    """BenchmarkError if the model's attention is not where the clocks are."""
    if any(step.seconds["attention"] == 0.0 for step in steps):
        raise BenchmarkError("the model's attention does not go through CpuKernel: its time cannot be told apart")


def measure_round(
    bench: Bench, plan: Plan, cells: Sequence[Cell], seed: int, steps: dict[Cell, list[Step]], on_done: OnDone
) -> None:
    """Add the steps of one round to `steps`."""
    prefills = [cell for cell in cells if cell.phase == PREFILL]
    decodes = [cell for cell in cells if cell.phase == DECODE]
    for cell in random.Random(seed).sample(decodes, len(decodes)):
        steps[cell] += bench.decode(cell, plan.num_steps, plan.num_decoded)
        on_done()
    for number in range(1 + plan.num_steps if prefills else 0):
        for cell, step in bench.prefill(prefills).items():
            if number:  # the first prompt warms up
                steps[cell].append(step)
        on_done()


def open_bench(
    stack: ExitStack, scratch: Path, loaded: LoadedModel, config: EngineConfig, cells: Sequence[Cell], num_decoded: int
) -> Bench:
    """Its instance has a pool for the largest of these cells; all is closed with `stack`."""
    clocks = stack.enter_context(timing())
    others = Others(scratch)
    stack.callback(others.close)
    num_blocks = num_blocks_for(cells, num_decoded, config.block_size)
    instance = Instance(loaded, config, num_blocks, scratch, others, clocks)
    stack.callback(instance.close)
    return Bench(instance, others, loaded.vocab_size)
