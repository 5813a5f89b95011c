"""What every figure of a run means: the definitions are here and nowhere else, for real runs and simulated ones.

Per request, on one clock:

- **TTFT** (time to first token): arrival to first token, s. A request arrives when its client has sent it; a simulated
  one when it reaches the frontend.
- **E2EL** (end-to-end latency): arrival to last token, s.
- **TPOT** (time per output token): (E2EL - TTFT) / (output tokens - 1), s; none for an answer of one token.

Over all requests of a run:

- **ITL** (inter-token latency): the gap between two tokens of an answer that follow each other, s; every gap counts
  once, so long answers weigh more. A client sees events rather than tokens: where one brings several, ITL is the gap
  between events.
- **duration**: first arrival to the end of the last answer, s (the makespan).
- **throughput**: answered requests, and their prompt and output tokens, divided by the duration.
- **goodput**: requests within every bound of the SLO, divided by the duration; **good fraction**: their share of all
  requests. A request that failed or was refused is in neither, and an answer of one token has no TPOT to be late with.

Percentiles are linear between neighbours (numpy's default). The ITLs of a simulated run are counted in a
`Distribution`, whose percentiles are within 0.2 % of the exact ones.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from flowkv.cluster.roles import Flip
from flowkv.types import InstanceCounters, Regime, Role

_BUCKETS_PER_OCTAVE = 256  # a bucket is at most 1/256 of its values wide: 0.4 %
_MIN_EXPONENT = -20  # of two; all below is one bucket: 0.5 us
_MAX_EXPONENT = 20  # all above is one bucket: 6 days
_NUM_BUCKETS = (_MAX_EXPONENT - _MIN_EXPONENT) * _BUCKETS_PER_OCTAVE


# --- one request ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Record:
    """What became of one request, in seconds. `error` is None exactly where it was answered to the end."""

    index: int  # in the workload
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefill_instance: str | None = None  # that gave the first token
    decode_instance: str | None = None  # that gave the last one
    ttft_s: float | None = None
    e2el_s: float | None = None
    error: str | None = None
    is_refused: bool = False  # turned away before it cost anything; `error` says why

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of fewer than two tokens."""
        if self.ttft_s is None or self.e2el_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in seconds; None bounds nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def holds(self, record: Record) -> bool:
        if record.error is not None or record.ttft_s is None:
            return False
        in_ttft = self.ttft_s is None or record.ttft_s <= self.ttft_s
        return in_ttft and (self.tpot_s is None or record.tpot_s is None or record.tpot_s <= self.tpot_s)


# --- many values ---------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the values lie, linear between neighbours (numpy's default).

    Raises ValueError where there are no values.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    return _percentile_of_sorted(sorted(values), fraction)


def _percentile_of_sorted(ordered: Sequence[float], fraction: float) -> float:
    at = fraction * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summarize(values: "Sequence[float] | Distribution") -> dict[str, float] | None:
    """Mean, p50, p90, p99 and max; None where there are no values."""
    if isinstance(values, Distribution):
        return values.summary()
    if not values:
        return None
    ordered = sorted(values)
    return {
        "mean": sum(values) / len(values),
        **_points(lambda f: _percentile_of_sorted(ordered, f)),
        "max": ordered[-1],
    }


class _Quantile(Protocol):
    def __call__(self, fraction: float, /) -> float: ...


def _points(quantile: _Quantile) -> dict[str, float]:
    return {"p50": quantile(0.5), "p90": quantile(0.9), "p99": quantile(0.99)}


class Distribution:
    """Seconds, counted in buckets of 0.4 % from half a microsecond to six days: any number of them fits in memory.

    What was added in whatever order or grouping gives the same counts, and the mean (of whole nanoseconds) and the
    extremes to the last bit.
    """

    def __init__(self) -> None:
        self._counts: npt.NDArray[np.int64] = np.zeros(_NUM_BUCKETS, np.int64)
        self.count = 0
        self._sum_ns = 0
        self._min_s = math.inf
        self._max_s = 0.0

    def add(self, values_s: npt.ArrayLike, weight: int = 1) -> None:
        """Each of the values `weight` times. They are not negative."""
        values = np.asarray(values_s, np.float64).ravel()
        if values.size == 0:
            return
        np.add.at(self._counts, _buckets(values), weight)
        self.count += weight * values.size
        self._sum_ns += weight * int(np.rint(values * 1e9).astype(np.int64).sum())
        self._min_s = min(self._min_s, float(values.min()))
        self._max_s = max(self._max_s, float(values.max()))

    def add_one(self, seconds: float, weight: int = 1) -> None:
        """As `add` of one value, without making an array of it."""
        fraction, exponent = math.frexp(seconds)
        bucket = (exponent - 1 - _MIN_EXPONENT) * _BUCKETS_PER_OCTAVE + int((2 * fraction - 1) * _BUCKETS_PER_OCTAVE)
        self._counts[min(max(bucket, 0), _NUM_BUCKETS - 1) if seconds > 0 else 0] += weight
        self.count += weight
        self._sum_ns += weight * round(seconds * 1e9)
        self._min_s = min(self._min_s, seconds)
        self._max_s = max(self._max_s, seconds)

    def quantile(self, fraction: float) -> float:
        """The middle of the bucket that holds the value of this rank. Raises ValueError where there are no values."""
        if not self.count:
            raise ValueError("no values to take a percentile of")
        rank = fraction * (self.count - 1)
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank, side="right"))
        return min(max(_middle_s(bucket), self._min_s), self._max_s)

    def summary(self) -> dict[str, float] | None:
        """As `summarize`."""
        if not self.count:
            return None
        return {"mean": self._sum_ns / self.count / 1e9, **_points(self.quantile), "max": self._max_s}

    def curve(self) -> tuple[list[float], list[float]]:
        """(seconds, fraction of the values up to there) of every bucket that is not empty."""
        used = np.flatnonzero(self._counts)
        fractions = np.cumsum(self._counts[used]) / max(1, self.count)
        return [_middle_s(bucket) for bucket in used.tolist()], fractions.tolist()


def _buckets(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The leading bits of a float number its bucket: exact, and equal for one value alone and for many at once."""
    fractions, exponents = np.frexp(values)
    inside = ((2 * fractions - 1) * _BUCKETS_PER_OCTAVE).astype(np.int64)
    buckets = (exponents.astype(np.int64) - 1 - _MIN_EXPONENT) * _BUCKETS_PER_OCTAVE + inside
    clipped: npt.NDArray[np.int64] = np.where(values > 0, np.clip(buckets, 0, _NUM_BUCKETS - 1), 0)
    return clipped


def _middle_s(bucket: int) -> float:
    octave, inside = divmod(bucket, _BUCKETS_PER_OCTAVE)
    return math.ldexp(1 + (inside + 0.5) / _BUCKETS_PER_OCTAVE, octave + _MIN_EXPONENT)


# --- one run -------------------------------------------------------------------------------------------------------


class InstanceSample(NamedTuple):
    role: Role
    waiting_tokens: int  # of prompts, still to be computed
    num_decoding: int
    used_fraction: float  # of the KV blocks


class Sample(NamedTuple):
    """The cluster at one moment, instances by name."""

    time_s: float
    instances: dict[str, InstanceSample]
    regime: Regime


@dataclass(slots=True)
class RunResult:
    """What one run gave: a record for each request, and every ITL of a real run or the counts of a simulated one's."""

    records: list[Record]
    itl: "Sequence[float] | Distribution"
    duration_s: float


@dataclass(slots=True)
class SimResult(RunResult):
    """A simulated run; times count from the start of the simulation."""

    itl: Distribution
    samples: list[Sample] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)
    counters: dict[str, InstanceCounters] = field(default_factory=dict)  # at the end, by instance
    num_events: int = 0  # of the simulation


def figures(result: RunResult, slo: Slo) -> dict[str, Any]:
    """Every figure of one run, in seconds and tokens."""
    answered = [record for record in result.records if record.error is None]
    num_refused = sum(record.is_refused for record in result.records)
    num_good = sum(slo.holds(record) for record in result.records)
    prompt_tokens = sum(record.num_prompt_tokens for record in answered)
    output_tokens = sum(record.num_output_tokens for record in answered)

    def per_s(amount: int) -> float:  # where all were refused no time has passed
        return amount / result.duration_s if result.duration_s > 0 else 0.0

    return {
        "num_requests": len(result.records),
        "num_errors": len(result.records) - len(answered) - num_refused,
        "num_refused": num_refused,
        "duration_s": result.duration_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": per_s(len(answered)),
        "prompt_tokens_per_s": per_s(prompt_tokens),
        "output_tokens_per_s": per_s(output_tokens),
        "ttft_s": summarize(_known(record.ttft_s for record in answered)),
        "itl_s": summarize(result.itl),
        "tpot_s": summarize(_known(record.tpot_s for record in answered)),
        "e2el_s": summarize(_known(record.e2el_s for record in answered)),
        "goodput_per_s": per_s(num_good),
        "good_fraction": num_good / len(result.records) if result.records else 0.0,
    }


def totals(counters: Iterable[InstanceCounters]) -> dict[str, float]:
    """Sums over instances, by the names that `/metrics` has for them."""
    sums: dict[str, float] = {}
    for one in counters:
        for name, value in msgspec.structs.asdict(one).items():
            key = name.removeprefix("num_")
            sums[key] = sums.get(key, 0) + value
    return sums


def server_figures(counted: Mapping[str, float]) -> dict[str, float]:
    """Transfer rate (bytes/s), share of it hidden under prefill, and what of a step is neither model nor sampling."""
    figures = dict(sorted(counted.items()))
    if (seconds := counted.get("transfer_seconds", 0.0)) > 0:
        figures["transfer_bytes_per_s"] = counted["transfer_bytes"] / seconds
        figures["transfer_hidden_fraction"] = 1.0 - counted["transfer_exposed_seconds"] / seconds
    if (computing := counted.get("forward_seconds", 0.0) + counted.get("sampling_seconds", 0.0)) > 0:
        figures["step_overhead_fraction"] = 1.0 - computing / counted["step_seconds"]
    return figures


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
