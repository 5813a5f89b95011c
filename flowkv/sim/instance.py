"""One simulated instance: the shell around a real `Engine`. Steps take virtual time instead of computing."""

from bisect import bisect_left
from collections.abc import Sequence
from operator import sub

import numpy as np

from flowkv.config import ClusterConfig, parse_bytes
from flowkv.cost import prefill_pairs
from flowkv.engine.batch import Batch, BatchResult, Draw, ItemResult
from flowkv.engine.effects import Connect, Effect, MoveBlocks, Send, Write
from flowkv.engine.engine import Engine
from flowkv.messages import Message, Outputs
from flowkv.sim.chrome import Recorder
from flowkv.sim.costs import CostModel, StepShape
from flowkv.sim.world import BACKEND, CONTROLLER, World
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.types import Role

_IDLE_BEAT_S = 1.0
_MAX_REPEATS = 512  # beyond that something always comes between
_NOISE_CHUNK = 4096
_MIN_NOISE_FACTOR = 0.5

_DRAW = Draw(0)
_NO_DRAWS = ItemResult()


class Noise:
    """Factors about 1 with which the steps of one instance differ from its cost model: the n-th step has the n-th."""

    def __init__(self, fraction: float, seed: Sequence[int]) -> None:
        self._fraction = fraction
        self._random = np.random.default_rng(seed)
        self._factors: list[float] = []
        self._at = 0

    def take(self, count: int) -> list[float]:
        """The next `count` factors; `give_back` those that were not used."""
        while len(self._factors) < self._at + count:
            drawn = 1.0 + self._fraction * self._random.standard_normal(_NOISE_CHUNK)
            self._factors = self._factors[self._at :] + np.maximum(drawn, _MIN_NOISE_FACTOR).tolist()
            self._at = 0
        self._at += count
        return self._factors[self._at - count : self._at]

    def give_back(self, count: int) -> None:
        self._at -= count


class SimInstance:
    """Messages and completions wait in `_inbox` while a step runs, as they do in an instance's process."""

    def __init__(
        self, name: str, role: Role, config: ClusterConfig, cost: CostModel, noise: Noise, world: World, coalesce: bool
    ) -> None:
        self.name = name
        self.cost = cost
        self.num_blocks = num_blocks_of(config, cost)
        self.engine = Engine(
            name,
            config.engine,
            self.num_blocks,
            role,
            CONTROLLER,
            config.transfer.lease_s,
            max_itl_s=config.slo.max_step_s,
        )
        self._idle_beat_s = min(_IDLE_BEAT_S, config.transfer.lease_s / 3)
        self._world = world
        self._loop = world.loop
        self._noise = noise
        self._max_repeats = _MAX_REPEATS if coalesce else 1
        self._inbox: list[Message | Written | Arrived | Linked] = []
        self._batch: Batch | None = None
        self._ends_s: list[float] = []  # of the steps of the batch in flight
        self._num_steps = 0  # of these, that will be made
        self._began_s = 0.0
        self._version = 0  # of what is to happen next: an event of an older one is void
        self.busy_s = 0.0
        self.is_gone = False

    def receive(self, what: "Message | Written | Arrived | Linked") -> None:
        if self.is_gone:
            return
        self._inbox.append(what)
        if self._batch is None:
            self.turn()
        elif self._num_steps > 1 and not (isinstance(what, Arrived) and self.engine.may_wait(what)):
            self._cut()

    def turn(self) -> None:
        """Between two steps: messages and completions, then the next batch."""
        now_s = self._loop.now_s
        inbox, self._inbox = self._inbox, []
        for what in inbox:
            self._take(what, now_s)
        self.engine.tick(now_s)
        batch = self.engine.next_batch(now_s, self._max_repeats)
        self._carry_out(())
        if batch is not None:
            self._start(batch)
        else:
            self._version += 1
            self._loop.after(self._idle_beat_s, self._beat, self._version)

    # --- steps -----------------------------------------------------------------------------------------------------

    def _start(self, batch: Batch) -> None:
        self._batch = batch
        self._began_s = self._loop.now_s
        self._ends_s = self._plan(batch)
        self._num_steps = len(self._ends_s)
        self._noise.give_back(batch.num_repeats - self._num_steps)
        self._version += 1
        self._loop.at(self._ends_s[-1], self._end, self._version)

    def _plan(self, batch: Batch) -> list[float]:
        """When each step ends, up to the last one that may be made without looking up."""
        factors = self._noise.take(batch.num_repeats)
        if batch.num_repeats == 1:
            return [self._began_s + self.cost.step_s(_shape(batch)) * factors[0]]
        shape = _shape(batch)
        seconds = self.cost.repeated_s(shape.decode_choices, shape.decode_context_tokens, batch.num_repeats)
        ends_s: list[float] = np.add.accumulate(np.concatenate(([self._began_s], seconds * factors)))[1:].tolist()
        return ends_s[: bisect_left(ends_s, batch.until_s) + 1]

    def _cut(self) -> None:
        """Something came: the step under way is the last of its batch."""
        num_steps = bisect_left(self._ends_s, self._loop.now_s, hi=self._num_steps) + 1
        if num_steps < self._num_steps:
            self._noise.give_back(self._num_steps - num_steps)
            self._num_steps = num_steps
            self._version += 1
            self._loop.at(self._ends_s[num_steps - 1], self._end, self._version)

    def _end(self, version: int) -> None:
        batch = self._batch
        if version != self._version or batch is None or self.is_gone:
            return
        self._batch = None
        ends_s = self._ends_s[: self._num_steps]
        drawn = ItemResult([_DRAW] * self._num_steps)
        items = [drawn if item.draws else _NO_DRAWS for item in batch.items]
        seconds = list(map(sub, ends_s, [self._began_s, *ends_s]))
        now_s = self._loop.now_s
        self.busy_s += now_s - self._began_s
        if self._world.recorder is not None:
            self._record(self._world.recorder, batch)
        result = BatchResult(batch.batch_id, items, num_steps=self._num_steps, step_seconds=seconds)
        self.engine.on_result(result, now_s - self._began_s, now_s)
        self._carry_out(ends_s)
        self.turn()

    def _record(self, recorder: Recorder, batch: Batch) -> None:
        for item in batch.items:
            request = item.sequence.request
            if item.start < len(request.prompt_ids):
                recorder.chunk(int(request.request_id), self.name, self._began_s, self._loop.now_s, item.num_tokens)

    def _beat(self, version: int) -> None:
        if version == self._version and self._batch is None and not self.is_gone:
            self.turn()

    # --- in and out ------------------------------------------------------------------------------------------------

    def _take(self, what: "Message | Written | Arrived | Linked", now_s: float) -> None:
        match what:
            case Written():
                self.engine.on_written(what, now_s)
            case Arrived():
                self.engine.on_arrived(what, now_s)
            case Linked():
                self.engine.on_linked(what, now_s)
            case _:
                self.engine.handle(what, now_s)

    def _carry_out(self, times_s: Sequence[float]) -> None:
        for effect in self.engine.take_effects():
            self._do(effect, times_s)

    def _do(self, effect: Effect, times_s: Sequence[float]) -> None:
        match effect:
            case Send(message=Outputs() as outputs):
                self._world.put_out(outputs, times_s or (self._loop.now_s,))
            case Send():
                self._world.send(self.name, effect.address, effect.message)
            case Write():
                self._world.write(self.name, effect)
            case Connect():
                self._loop.after(0.0, self.receive, Linked(effect.peer.instance, BACKEND))
            case MoveBlocks():
                pass  # blocks hold nothing here, and moving them is not on the model's account
            case _:
                pass  # arrivals that are expected or forgotten: completions name them anyway


def num_blocks_of(config: ClusterConfig, cost: CostModel) -> int:
    """Of an instance's pool: what its memory has room for, or what the configuration says."""
    num_bytes = parse_bytes(config.engine.kv_memory)
    if num_bytes is None:
        return cost.num_blocks(config.engine.block_size)
    return max(1, num_bytes // cost.block_bytes(config.engine.block_size))


def _shape(batch: Batch) -> StepShape:
    prefill_tokens = pairs = decode_choices = decode_context_tokens = num_drawn = 0
    for item in batch.items:
        if item.sequence.is_decoding:
            decode_choices += 1
            decode_context_tokens += item.stop
        else:
            prefill_tokens += item.num_tokens
            pairs += prefill_pairs(item.start, item.num_tokens)
        num_drawn += len(item.draws)
    return StepShape(prefill_tokens, pairs, decode_choices, decode_context_tokens, num_drawn)
