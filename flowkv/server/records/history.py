"""The last minutes of a frontend, second by second: what came, what went out, and how long it took.

Pure, and bounded: a second is folded into a few figures when it is over, and forgotten when `WINDOW_S` are.
"""

import math
from collections import deque
from typing import NamedTuple

import msgspec

WINDOW_S = 600
RECENT_S = 60
_LEAST_S, _MOST_S = 1e-6, 1e6
_BUCKETS_PER_FACTOR_E = 1 / math.log(1.04)  # each bucket is 4 % wider than the one before


class Quantiles(NamedTuple):
    """Of durations, in seconds, each within 2 %."""

    p50: float
    p95: float
    p99: float


class Second(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Second number `tick` of the frontend's clock. What is left out is zero, or was not measured."""

    tick: int
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    failed: int = 0  # ended by an error
    refused: int = 0  # answered with an error before anything was computed
    ttft_s: Quantiles | None = None
    itl_s: Quantiles | None = None
    waiting: int = 0  # requests whose prefill has not begun, over all instances, when this was last heard
    running: int = 0  # requests in prefill and choices that decode
    used_fraction: float = 0.0  # of all KV blocks


class Recent(msgspec.Struct, frozen=True, kw_only=True):
    """Of the last `RECENT_S` seconds together."""

    ttft_s: Quantiles | None = None
    itl_s: Quantiles | None = None


class Sketch:
    """Durations, counted in buckets of a constant ratio: how many there are does not depend on how many came."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, seconds: float, number: int = 1) -> None:
        bounded = min(max(seconds, _LEAST_S), _MOST_S)
        bucket = math.floor(math.log(bounded) * _BUCKETS_PER_FACTOR_E)
        self._counts[bucket] = self._counts.get(bucket, 0) + number

    def merge(self, other: "Sketch") -> None:
        for bucket, number in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + number

    def quantiles(self) -> Quantiles | None:
        """None where nothing was added."""
        if not self._counts:
            return None
        return Quantiles(self._quantile(0.5), self._quantile(0.95), self._quantile(0.99))

    def _quantile(self, fraction: float) -> float:
        """The middle of the bucket that holds the value of this rank."""
        rank = fraction * sum(self._counts.values())
        for bucket in sorted(self._counts):
            rank -= self._counts[bucket]
            if rank <= 0:
                break
        return math.exp((bucket + 0.5) / _BUCKETS_PER_FACTOR_E)


class _Open:
    """The second that is not over yet."""

    def __init__(self, tick: int) -> None:
        self.tick = tick
        self.requests = self.prompt_tokens = self.output_tokens = self.finished = self.failed = self.refused = 0
        self.ttft, self.itl = Sketch(), Sketch()

    def closed(self, held: "Held") -> Second:
        return Second(
            tick=self.tick, requests=self.requests, prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens,
            finished=self.finished, failed=self.failed, refused=self.refused,
            ttft_s=self.ttft.quantiles(), itl_s=self.itl.quantiles(),
            waiting=held.waiting, running=held.running, used_fraction=held.used_fraction,
        )  # fmt: skip


class Held(NamedTuple):
    """What all instances together hold at a moment."""

    waiting: int = 0
    running: int = 0
    used_fraction: float = 0.0


class History:
    """Told of everything when it happens. Seconds in which nothing happened are there too."""

    def __init__(self, now_s: float) -> None:
        self._open = _Open(math.floor(now_s))
        self._closed: deque[Second] = deque(maxlen=WINDOW_S)
        self._sketches: deque[tuple[Sketch, Sketch]] = deque(maxlen=RECENT_S)  # TTFT and ITL of the last seconds
        self._recent = Recent()
        self._held = Held()

    def submitted(self, now_s: float, prompt_tokens: int) -> None:
        second = self._at(now_s)
        second.requests += 1
        second.prompt_tokens += prompt_tokens

    def refused(self, now_s: float) -> None:
        self._at(now_s).refused += 1

    def first_token(self, now_s: float, ttft_s: float) -> None:
        self._at(now_s).ttft.add(ttft_s)

    def tokens(self, now_s: float, number: int, gap_s: float | None) -> None:
        """`number` output tokens of a choice, each `gap_s` after the one before (None: the first of the choice)."""
        second = self._at(now_s)
        second.output_tokens += number
        if gap_s is not None:
            second.itl.add(gap_s, number)

    def ended(self, now_s: float, *, failed: bool) -> None:
        """A request, to its last choice."""
        second = self._at(now_s)
        second.finished += not failed
        second.failed += failed

    def holds(self, now_s: float, held: Held) -> None:
        self._at(now_s)
        self._held = held

    def since(self, now_s: float, tick: int) -> list[Second]:
        """The seconds from `tick` on that are over, oldest first."""
        self._at(now_s)
        return [second for second in self._closed if second.tick >= tick]

    def recent(self, now_s: float) -> Recent:
        self._at(now_s)
        return self._recent

    def _at(self, now_s: float) -> _Open:
        now = math.floor(now_s)
        if now > self._open.tick:
            self._advance(now)
        return self._open

    def _advance(self, now: int) -> None:
        """After a long sleep only the window's worth of empty seconds is made up."""
        self._close()
        for tick in range(max(self._open.tick + 1, now - WINDOW_S), now):
            self._open = _Open(tick)
            self._close()
        self._open = _Open(now)
        self._recent = self._merged()

    def _close(self) -> None:
        self._closed.append(self._open.closed(self._held))
        self._sketches.append((self._open.ttft, self._open.itl))

    def _merged(self) -> Recent:
        ttft, itl = Sketch(), Sketch()
        for one_ttft, one_itl in self._sketches:
            ttft.merge(one_ttft)
            itl.merge(one_itl)
        return Recent(ttft_s=ttft.quantiles(), itl_s=itl.quantiles())
