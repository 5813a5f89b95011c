"""Clocks around the calls of which a step is made."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar
from unittest.mock import patch

from flowkv.engine.batch import BatchResult
from flowkv.engine.engine import Engine
from flowkv.model.cpu_kernel import CpuKernel
from flowkv.transfer.select import SelectingTransfer
from flowkv.wire import Mailbox, Outbox

PARTS = ("forward", "attention", "sampling", "scheduling", "messages", "rest")
TIMED: tuple[tuple[str, type, tuple[str, ...]], ...] = (
    ("attention", CpuKernel, ("write_kv", "rotate_and_write", "attend")),
    ("scheduling", Engine, ("handle", "tick", "next_batch", "on_result", "take_effects")),
    ("messages", Mailbox, ("receive_all",)),
    ("messages", Outbox, ("send",)),
    ("messages", SelectingTransfer, ("poll", "expect", "forget")),
)  # none of them calls another

P = ParamSpec("P")
T = TypeVar("T")


class Clocks:
    """Seconds by part since they were last cleared."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, part: str, call: Callable[P, T]) -> Callable[P, T]:
        seconds, clock = self.seconds, time.perf_counter

        def timed_call(*args: P.args, **kwargs: P.kwargs) -> T:
            began_s = clock()
            value = call(*args, **kwargs)
            seconds[part] += clock() - began_s
            return value

        return timed_call

    def split(self, result: BatchResult, step_s: float, cpu_s: float) -> dict[str, float]:
        """`Step.seconds` of the step that they have timed."""
        parts = {
            "forward": result.forward_seconds - self.seconds["attention"],
            "attention": self.seconds["attention"],
            "sampling": result.sampling_seconds,
            "scheduling": self.seconds["scheduling"],
            "messages": self.seconds["messages"],
        }
        return {**parts, "rest": step_s - sum(parts.values()), "step": step_s, "idle": max(0.0, step_s - cpu_s)}


@contextmanager
def timing() -> Iterator[Clocks]:
    """While the context lasts, every call of `TIMED` is timed."""
    clocks = Clocks()
    with ExitStack() as stack:
        for part, owner, names in TIMED:
            for name in names:
                stack.enter_context(patch.object(owner, name, clocks.timed(part, getattr(owner, name))))
        yield clocks
