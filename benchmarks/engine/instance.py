"""One instance that makes steps as its process does, and those whom it hears from and writes to."""

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import BenchmarkError
from benchmarks.engine.clocks import Clocks
from flowkv.config import EngineConfig
from flowkv.cost import prefill_pairs
from flowkv.engine.batch import Batch
from flowkv.engine.effects import Effect, Expect, Forget, Send
from flowkv.engine.engine import Engine
from flowkv.engine.repeat import run_repeats
from flowkv.engine.runner import TorchRunner
from flowkv.grammar.matchers import Matchers
from flowkv.kv.pool import KvPool
from flowkv.messages import Abort, AnyMessage, Dispatch, KvReady, Message, Reserve
from flowkv.model.loading import DTYPES, LoadedModel
from flowkv.transfer.select import open_transfer
from flowkv.types import Request, Role
from flowkv.wire import Mailbox, Outbox, SyncContext

NAME = "instance"
WAIT_S = 30.0
PATTERN_ELEMENTS = 2**20


class Step(NamedTuple):
    """What one step computed, and `seconds` by part, of the whole `step`, and `idle`."""

    start: int  # of its first item
    num_items: int
    num_tokens: int
    num_draws: int
    context_tokens: int  # whose KV is read
    num_pairs: int  # of a token and a position that it attends to
    seconds: dict[str, float]


class Others:
    """Controller, frontend and prefill instance in one. Its ZeroMQ context has a thread of its own, so that what the
    instance sends is read as it would be in another process."""

    def __init__(self, folder: Path) -> None:
        self._context = SyncContext()
        self._mailbox = Mailbox(self._context, f"ipc://{folder}/others")
        self._outbox = Outbox(self._context)
        self._to = f"ipc://{folder}/{NAME}"
        self._numbers = count(1)
        self.address = self._mailbox.address

    def dispatch(self, request: Request) -> None:
        self._send(Dispatch(next(self._numbers), request, self.address, []))

    def hand_over(self, request: Request) -> None:
        """As if all of its KV had been written and the first token drawn elsewhere."""
        attempt = next(self._numbers)
        self._send(Reserve("prefill", attempt, request, self.address))
        self._send(KvReady("prefill", request.request_id, attempt, 0, {0: [request.prompt_ids[0]]}))

    def abort(self, request: Request) -> None:
        self._send(Abort(request.request_id))

    def take(self) -> list[AnyMessage]:
        """What has come from the instance so far."""
        return self._mailbox.receive_all()

    def close(self) -> None:
        self._mailbox.close()
        self._outbox.close()
        self._context.term()

    def _send(self, message: Message) -> None:
        self._outbox.send(self._to, message)


class Instance:
    """The loop of an instance's process, one turn at a time."""

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, num_blocks: int, folder: Path, others: Others, clocks: Clocks
    ) -> None:
        layout = loaded.layout(config.block_size)
        pool = KvPool.create(num_blocks, layout.block_bytes)
        fill(torch.frombuffer(pool.buffer, dtype=DTYPES[layout.dtype]))
        self.engine = Engine(NAME, config, num_blocks, Role.MIXED, others.address)
        self._runner = TorchRunner(loaded, layout, pool.buffer, num_blocks, Matchers(None, 0))
        self._transfer = open_transfer(NAME, pool, layout.fingerprint, f"{folder}/pool", "auto", False)
        self._context = SyncContext()
        self._mailbox = Mailbox(self._context, f"ipc://{folder}/{NAME}")
        self._outbox = Outbox(self._context)
        self._clocks = clocks

    def step(self) -> Step:
        """BenchmarkError if there is nothing to compute."""
        self._clocks.seconds.clear()
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        self._take_messages()
        batch = self.engine.next_batch(time.monotonic())
        self._carry_out()
        if batch is None:
            raise BenchmarkError("the instance has nothing to compute")
        result = run_repeats(self._runner, batch)
        self.engine.on_result(result, time.perf_counter() - began_s, time.monotonic())
        self._carry_out()
        step_s, cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
        return describe(batch, self._clocks.split(result, step_s, cpu_s))

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Take messages until it is so, without computing. BenchmarkError after `WAIT_S`."""
        deadline_s = time.monotonic() + WAIT_S
        while not is_so():
            self.wait_message(deadline_s)
            self._take_messages()
            self._carry_out()

    def wait_message(self, deadline_s: float) -> None:
        """Until there is one to take; `step` does."""
        if not self._mailbox.socket.poll(max(0, round(1000 * (deadline_s - time.monotonic())))):
            raise BenchmarkError("the instance did not take what was asked of it")

    def close(self) -> None:
        self._transfer.close()
        self._mailbox.close()
        self._outbox.close()
        self._context.term()

    def _take_messages(self) -> None:
        for message in self._mailbox.receive_all():
            self.engine.handle(message, time.monotonic())
        self._transfer.poll()
        self.engine.tick(time.monotonic())

    def _carry_out(self) -> None:
        for effect in self.engine.take_effects():
            self._do(effect)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._outbox.send(effect.address, effect.message)
            case Expect():
                self._transfer.expect(effect.immediate)
            case Forget():
                self._transfer.forget(effect.immediate)
            case _:
                raise AssertionError(f"an instance that nobody takes requests from wants to {effect}")


def fill(elements: torch.Tensor) -> None:
    """With the same random numbers over and over: zeros would be attended to evenly."""
    pattern = torch.randn(min(PATTERN_ELEMENTS, len(elements))).to(elements.dtype)
    for part in torch.split(elements, len(pattern)):
        part.copy_(pattern[: len(part)])


def describe(batch: Batch, seconds: dict[str, float]) -> Step:
    items = batch.items
    return Step(
        start=items[0].start,
        num_items=len(items),
        num_tokens=batch.num_tokens,
        num_draws=sum(len(item.draws) for item in items),
        context_tokens=sum(item.stop for item in items),
        num_pairs=sum(prefill_pairs(item.start, item.num_tokens) for item in items),
        seconds=seconds,
    )
