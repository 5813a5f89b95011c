"""Steps at a stretch are single steps, event for event: the same messages at the same times, and the same blocks."""

import random
from bisect import bisect_left
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.config import EngineConfig
from flowkv.engine.batch import Batch, BatchResult, Draw, ItemResult
from flowkv.engine.effects import Connect, Send, Write
from flowkv.engine.engine import Engine
from flowkv.engine.repeat import run_repeats
from flowkv.engine.toy import ToyRunner, toy_layout
from flowkv.messages import Abort, Dispatch, Drain, LoadReport, Message, Outputs, PeerInfo, PeerUp, Renew, SetRole
from flowkv.transfer.base import Arrived, Linked, Written
from flowkv.types import NO_TOKEN, FinishReason, Request, Role, SamplingParams
from tests.effort import examples
from tests.pools import descriptor

DELAY_S = 0.003  # of a message
BEAT_S = 0.1
LEASE_S = 0.4
CONFIG = EngineConfig(block_size=4, max_batch_tokens=16, max_choices=8)


@dataclass(frozen=True)
class Turn:
    """What a shell has told itself to do; void if another has come after it."""

    is_beat: bool
    version: int


class Shell:
    """What runs an engine: what comes during a step waits for its end, and ends a stretch of them with it."""

    def __init__(self, world: "World", name: str, role: Role, num_blocks: int, max_itl_s: float | None) -> None:
        self.name = name
        self.world = world
        self.engine = Engine(name, CONFIG, num_blocks, role, "controller", LEASE_S, max_itl_s)
        self.factors = random.Random(f"{world.seed} {name}")
        self.step_factors: list[float] = []
        self.num_made = 0
        self.inbox: list[Any] = []
        self.batch: Batch | None = None
        self.began_s = 0.0
        self.ends_s: list[float] = []
        self.version = 0

    def receive(self, what: object) -> None:
        self.inbox.append(what)
        if self.batch is None:
            self.turn()
        else:
            self.end_with(bisect_left(self.ends_s, self.world.now_s) + 1)

    def turn(self) -> None:
        now_s, inbox = self.world.now_s, self.inbox
        self.inbox = []
        for what in inbox:
            match what:
                case Written():
                    self.engine.on_written(what, now_s)
                case Arrived():
                    self.engine.on_arrived(what, now_s)
                case Linked():
                    self.engine.on_linked(what, now_s)
                case _:
                    self.engine.handle(what, now_s)
        self.engine.tick(now_s)
        self.carry_out([])
        self.batch = self.engine.next_batch(now_s, self.world.max_repeats)
        self.carry_out([])
        if self.batch is None:
            self.version += 1
            self.world.at(now_s + BEAT_S, self.name, Turn(True, self.version))
            return
        self.world.num_batches += 1
        self.began_s = now_s
        self.ends_s = self.plan(self.batch)
        self.end_with(len(self.ends_s))

    def plan(self, batch: Batch) -> list[float]:
        """When each step ends."""
        ends_s, now_s = [], self.began_s
        slots = sum(item.stop for item in batch.items)
        for i in range(batch.num_repeats):
            while len(self.step_factors) <= self.num_made + i:
                self.step_factors.append(self.factors.uniform(0.5, 1.5))
            now_s += (0.004 + 1e-5 * (slots + i * len(batch.items))) * self.step_factors[self.num_made + i]
            ends_s.append(now_s)
            if now_s >= batch.until_s:
                break
        return ends_s

    def end_with(self, num_steps: int) -> None:
        self.ends_s = self.ends_s[:num_steps]
        self.version += 1
        self.world.at(self.ends_s[-1], self.name, Turn(False, self.version))

    def wake(self, turn: Turn) -> None:
        if turn.version != self.version or turn.is_beat != (self.batch is None):
            return
        if self.batch is not None:
            self.finish(self.batch)
        self.turn()

    def finish(self, batch: Batch) -> None:
        self.batch = None
        num_steps = len(self.ends_s)
        self.num_made += num_steps
        items = [
            ItemResult([
                Draw(token(item.sequence.request.request_id, choice, len(item.sequence.output_ids) + i))
                for choice in item.draws for i in range(num_steps)
            ])
            for item in batch.items
        ]  # fmt: skip
        step_seconds = [end_s - start_s for start_s, end_s in pairwise([self.began_s, *self.ends_s])]
        result = BatchResult(batch.batch_id, items, num_steps=num_steps, step_seconds=step_seconds)
        self.engine.on_result(result, sum(step_seconds), self.ends_s[-1])
        self.carry_out(self.ends_s)

    def carry_out(self, times_s: list[float]) -> None:
        self.engine.check_integrity()
        for effect in self.engine.take_effects():
            match effect:
                case Send(message=Outputs() as outputs):
                    self.world.put_out(outputs, times_s or [self.world.now_s])
                case Send():
                    self.world.send(self, effect.address, effect.message)
                case Write():
                    num_blocks = sum(run.num_blocks for run in effect.runs)
                    done_s = self.world.now_s + self.world.block_s * num_blocks
                    self.world.at(done_s, effect.peer, Arrived(effect.immediate, num_blocks))
                    self.world.at(done_s, self.name, Written(effect.ticket, num_blocks, 0.001, done_s))
                case Connect():
                    self.world.at(self.world.now_s, self.name, Linked(effect.peer.instance, "local"))
                case _:
                    pass

    @property
    def tables(self) -> list[tuple[str, int, int, tuple[int, ...]]]:
        scheduler = self.engine.scheduler
        return [
            (s.request.request_id, s.choice, s.num_computed, tuple(s.block_table))
            for queue in (scheduler.waiting, scheduler.prefilling, scheduler.decoding) for s in queue
        ]  # fmt: skip


class World:
    """Three instances, and what came of a script of messages to them."""

    def __init__(self, seed: int, max_repeats: int, num_blocks: int, max_itl_s: float | None) -> None:
        self.seed = seed
        self.max_repeats = max_repeats
        self.now_s = 0.0
        self.num_batches = 0
        self.block_s = 0.003  # to write one
        self.loses_renewals = False
        self.log: list[tuple[Any, ...]] = []
        self.tokens: list[tuple[Any, ...]] = []
        self._heap: list[tuple[float, bool, str, str, int, object]] = []
        self._numbers = count()
        names = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
        self.shells = {name: Shell(self, name, role, num_blocks, max_itl_s) for name, role in names.items()}
        for name in names:
            for peer in names:
                if peer != name:
                    self.at(0.0, name, PeerUp(PeerInfo(peer, peer, descriptor(peer, num_blocks=num_blocks))))

    def at(self, time_s: float, name: str, what: object) -> None:
        """Of what happens at once, what comes from outside is first, and the order does not depend on who made it."""
        is_own = isinstance(what, Turn)
        heappush(self._heap, (time_s, is_own, name, "" if is_own else repr(what), next(self._numbers), what))

    def run(self, until_s: float) -> None:
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, name, _, _, what = heappop(self._heap)
            if isinstance(what, Turn):
                self.shells[name].wake(what)
            else:
                self.shells[name].receive(what)

    def send(self, sender: Shell, address: str, message: Message) -> None:
        tables = sender.tables if isinstance(message, LoadReport) else []
        self.log.append((self.now_s, sender.name, address, message, tables))
        if address in self.shells and not (self.loses_renewals and isinstance(message, Renew)):
            self.at(self.now_s + DELAY_S, address, message)

    def put_out(self, outputs: Outputs, times_s: list[float]) -> None:
        for output in outputs.outputs:
            for i, token_id in enumerate(output.token_ids):
                reason = output.finish_reason if i == len(output.token_ids) - 1 else None
                where = (output.request_id, output.choice, output.index + i)
                self.tokens.append((times_s[i], outputs.instance, *where, token_id, reason))


def token(request_id: str, choice: int, index: int) -> int:
    return hash((len(request_id), int(request_id[1:]), choice, index)) % 50


def play(seed: int, max_repeats: int) -> World:
    rng = random.Random(seed)
    world = World(seed, max_repeats, rng.choice([40, 60, 400]), rng.choice([None, 0.006]))
    world.block_s, world.loses_renewals = rng.choice([0.003, 0.3]), rng.random() < 0.4
    for i in range(rng.randint(1, 12)):
        sampling = SamplingParams(
            max_tokens=rng.choice([1, 5, 40, 120]), n=rng.choice([1, 1, 1, 3]),
            stop_token_ids=frozenset(rng.choice([[], [], [7, 9]])),
        )  # fmt: skip
        request = Request(
            request_id=f"r{i}", prompt_ids=range(rng.randint(1, 60)), sampling=sampling, priority=rng.choice([0, 0, 1])
        )  # fmt: skip
        name, others = rng.choice([("p", ["d", "m"]), ("m", []), ("d", []), ("p", ["d"]), ("m", ["d"])])
        at_s = rng.uniform(0.1, 2.0)
        world.at(at_s, name, Dispatch(i, request, "f", others))
        if rng.random() < 0.2:
            world.at(at_s + rng.uniform(0, 1), rng.choice("pdm"), Abort(f"r{i}", rng.choice([None, 0])))
    for _ in range(rng.choice([0, 0, 1, 2])):
        world.at(rng.uniform(0.1, 2.0), rng.choice("pdm"), SetRole(rng.choice(list(Role))))
    if rng.random() < 0.2:
        world.at(rng.uniform(0.1, 2.0), rng.choice("pdm"), Drain())
    world.run(until_s=30.0)
    return world


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([7, 10**6]))
def test_steps_at_a_stretch_are_single_steps(seed: int, max_repeats: int) -> None:
    single, repeated = play(seed, 1), play(seed, max_repeats)
    assert repeated.log == single.log
    assert sorted(repeated.tokens) == sorted(single.tokens)
    for name, shell in single.shells.items():
        other = repeated.shells[name].engine
        assert other.load == shell.engine.load
        assert other.counters == shell.engine.counters
        assert other.blocks.free_segments() == shell.engine.blocks.free_segments()
        assert shell.engine.is_idle


def test_there_are_fewer_batches() -> None:
    seeds = range(20)
    assert sum(play(s, 10**6).num_batches for s in seeds) * 2 < sum(play(s, 1).num_batches for s in seeds)


@pytest.mark.parametrize("num_repeats", [1, 2, 9])
def test_a_runner_draws_the_same_tokens_at_a_stretch(num_repeats: int) -> None:
    answers = []
    for most in (1, num_repeats):
        layout = toy_layout(CONFIG.block_size)
        runner = ToyRunner(layout, memoryview(bytearray(64 * layout.block_bytes)), 64)
        engine = Engine("me", CONFIG, 64, Role.MIXED, "controller")
        for i in range(3):
            sampling = SamplingParams(max_tokens=10 + i, n=1 + i % 2, temperature=0.5, seed=i, logprobs=1)
            request = Request(request_id=f"r{i}", prompt_ids=[5 + i] * 11, sampling=sampling)
            engine.handle(Dispatch(i, request, "f", []), 0.0)
        while (batch := engine.next_batch(0.0, most)) is not None:
            engine.on_result(run_repeats(runner, batch), 0.001, 0.0)
            engine.check_integrity()
        sent = [e.message for e in engine.take_effects() if isinstance(e, Send) and e.address == "f"]
        outputs = [output for message in sent if isinstance(message, Outputs) for output in message.outputs]
        tokens: dict[tuple[str, int], list[Any]] = {}
        for output in outputs:
            assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
            tokens.setdefault((output.request_id, output.choice), []).extend(
                zip(output.token_ids, output.logprobs, strict=True)
            )
        answers.append(tokens)
    assert answers[0] == answers[1] and len(answers[0]) == 4
    assert {key: len(drawn) for key, drawn in answers[0].items()} == {
        ("r0", 0): 10, ("r1", 0): 11, ("r1", 1): 11, ("r2", 0): 12
    }  # fmt: skip


class Failing(ToyRunner):
    """Its model gives no numbers for the fifth token of one request."""

    def run(self, batch: Batch) -> BatchResult:
        result = super().run(batch)
        for i, item in enumerate(batch.items):
            if item.sequence.request.request_id == "bad" and len(item.sequence.output_ids) == 4:
                result.items[i] = ItemResult([Draw(NO_TOKEN)])
        return result


@pytest.mark.parametrize("num_repeats", [1, 20])
def test_a_token_that_cannot_be_drawn_ends_the_stretch_and_one_request(num_repeats: int) -> None:
    layout = toy_layout(CONFIG.block_size)
    runner = Failing(layout, memoryview(bytearray(64 * layout.block_bytes)), 64)
    engine = Engine("me", CONFIG, 64, Role.MIXED, "controller")
    for i, request_id in enumerate(["bad", "good"]):
        request = Request(request_id=request_id, prompt_ids=[5 + i] * 7, sampling=SamplingParams(max_tokens=15))
        engine.handle(Dispatch(i, request, "f", []), 0.0)
    num_batches = 0
    while (batch := engine.next_batch(0.0, num_repeats)) is not None:
        engine.on_result(run_repeats(runner, batch), 0.001, 0.0)
        engine.check_integrity()
        num_batches += 1
    assert num_batches == (15 if num_repeats == 1 else 3)
    sent = [e.message for e in engine.take_effects() if isinstance(e, Send) and e.address == "f"]
    outputs = [output for message in sent if isinstance(message, Outputs) for output in message.outputs]
    tokens = {name: [t for o in outputs if o.request_id == name for t in o.token_ids] for name in ("bad", "good")}
    ends = {o.request_id: o.finish_reason for o in outputs if o.finish_reason is not None}
    assert {name: len(ids) for name, ids in tokens.items()} == {"bad": 4, "good": 15}
    assert ends == {"bad": FinishReason.ERROR, "good": FinishReason.LENGTH}
    assert engine.is_idle and engine.load.used_blocks == 0
