"""The requests of each benchmark, as values that a worker process can make again: equal loads give equal requests."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from benchmarks.report import ROOT
from flowkv.cost import prefill_pairs
from flowkv.sim import workload
from flowkv.sim.costs import CostModel, StepShape, cost_model
from flowkv.sim.workload import LONGBENCH_OUTPUT_TOKENS, LONGBENCH_PROMPTS, TraceRequest

DATA = ROOT / "benchmarks" / "data"
TRACES = {"conversation": DATA / "mooncake_arrivals.csv.gz", "code": DATA / "azure_code_arrivals.csv.gz"}


class Load(Protocol):
    """Requests, by arrival."""

    def requests(self) -> Iterable[TraceRequest]: ...


@dataclass(frozen=True, slots=True)
class Shift:
    """`workload.SHIFT_PHASES` in turns, both rates times `scale`."""

    scale: float
    seed: int
    phase_s: float = 300.0
    duration_s: float = 1800.0

    def requests(self) -> list[TraceRequest]:
        return workload.shift_test(self.scale, self.seed, self.phase_s, self.duration_s)


@dataclass(frozen=True, slots=True)
class Trace:
    """The first `num_requests` (None: all) of one of `TRACES`, arriving `speedup` times as fast."""

    name: str
    speedup: float
    num_requests: int | None = None

    def requests(self) -> list[TraceRequest]:
        return workload.scaled(read(TRACES[self.name])[: self.num_requests], 1.0, self.speedup)


@dataclass(frozen=True, slots=True)
class Repeated:
    """`num_requests` with the lengths of a trace, over and over, arriving `speedup` times as fast."""

    name: str
    num_requests: int
    speedup: float

    def requests(self) -> Iterable[TraceRequest]:
        return workload.repeated(read(TRACES[self.name]), self.num_requests, self.speedup)


@dataclass(frozen=True, slots=True)
class Longbench:
    """Poisson arrivals of prompts shaped as `dataset`, 512 tokens each in answer."""

    dataset: str
    rate: float
    duration_s: float
    seed: int

    def requests(self) -> list[TraceRequest]:
        return workload.longbench(self.dataset, self.rate, self.duration_s, self.seed)


@cache
def read(path: Path) -> list[TraceRequest]:
    return workload.read_trace(path)


# --- how much is much ----------------------------------------------------------------------------------------------

_CHUNK_TOKENS = 2048
_DECODE_BATCH = 16


def request_s(cost: CostModel, num_prompt: int, num_output: int, batch: int = _DECODE_BATCH) -> float:
    """What one request takes of an instance that does nothing but such requests, its decodes `batch` at a time."""

    def chunk_s(start: int) -> float:
        num = min(_CHUNK_TOKENS, num_prompt - start)
        return cost.step_s(StepShape(num, prefill_pairs(start, num), 0, 0, 0))

    context = batch * (num_prompt + num_output // 2)
    step_s = cost.step_s(StepShape(0, 0, batch, context, batch))
    return sum(map(chunk_s, range(0, num_prompt, _CHUNK_TOKENS))) + num_output * step_s / batch


def full_rate(costs: Iterable[CostModel], num_prompt: int, num_output: int) -> float:
    """Requests/s that would keep these instances busy, each doing both phases: what loads are given as a share of."""
    return sum(1 / request_s(cost, num_prompt, num_output) for cost in costs)


def longbench_rate(costs: Iterable[str], dataset: str, share: float) -> float:
    """Requests/s that take this share of what instances of these cost models can do."""
    models = [cost_model(name) for name in costs]
    return rounded(full_rate(models, round(LONGBENCH_PROMPTS[dataset].mean), LONGBENCH_OUTPUT_TOKENS), share)


def rounded(rate: float, share: float) -> float:
    """A share of a rate, to three digits: so that it can be typed again."""
    return float(f"{share * rate:.3g}")
