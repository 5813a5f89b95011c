"""Which cluster serves a workload best: candidates are compared in the simulator.

Three questions: which candidate keeps most requests within the SLO (`compare`), how many requests a second each can
take (`capacities`), and how few instances are enough (`fewest`). Short runs go before long ones: what is clearly worse
over the first part of the workload is dropped there (successive halving; Jamieson and Talwalkar, AISTATS 2016).
Everything is a function of the outcomes, so the same seeds give the same plan.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flowkv.sim.candidates import KINDS, Candidate

_SHARES = (0.1, 1 / 3)  # of the workload, before the whole of it
_MIN_REQUESTS = 200  # of a short run: with fewer, one in a hundred says nothing
_CLEAR_SHARE = 0.02  # of requests within the SLO
_CLEAR_LATENCY = 1.1
_COARSE = 1.25  # a bisection ends when its bounds are as close
_FINE = 1.02
MAX_SPEEDUP = 64.0  # and the lowest is 1/64


class Job(NamedTuple):
    """One simulation: the first `share` of the workload that `seed` draws, arriving `speedup` times as fast."""

    candidate: Candidate
    seed: int
    share: float
    speedup: float


class Outcome(NamedTuple):
    """What became of the requests; seconds are None where no request has such a figure."""

    num_requests: int
    good_fraction: float  # within the SLO; without one, answered
    goodput_per_s: float
    ttft_mean_s: float | None
    ttft_p99_s: float | None
    tpot_p99_s: float | None
    e2el_mean_s: float | None
    num_flips: float
    errors: tuple[str, ...] = ()  # a few of the different ones


Evaluate = Callable[[Sequence[Job], str], list[Outcome]]
"""Runs simulations, in any order; what came of them, in theirs. The text says to people what they are for."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of a candidate: the means over its seeds of its longest run.

    `speedup` is that of the run; `capacities` finds the highest. 0 if the slowest that was tried was too fast already,
    and then the outcome is of that one.
    """

    candidate: Candidate
    outcome: Outcome
    lowest_fraction: float  # `good_fraction` of the worst seed
    share: float = 1.0
    speedup: float = 1.0
    is_dropped: bool = False  # early: the figures are of a part of the workload only

    @property
    def merit(self) -> tuple[float, float]:
        """To sort by, the best first: share within the SLO, to a tenth of a percent, then mean latency."""
        latency_s = self.outcome.e2el_mean_s
        return -round(self.outcome.good_fraction, 3), math.inf if latency_s is None else latency_s


def best(rows: Iterable[Row], *, is_split: bool) -> Row | None:
    """The first of these that splits prefill from decode, or of those that do not."""
    return next((row for row in rows if row.candidate.is_split is is_split and not row.is_dropped), None)


def best_of_kind(rows: Iterable[Row], kind: str) -> Row | None:
    return next((row for row in rows if row.candidate.kind == kind and not row.is_dropped), None)


# --- one load ------------------------------------------------------------------------------------------------------


def short_runs(num_candidates: int, num_requests: int) -> list[float]:
    """Shares of the workload to drop candidates on, before the whole of it. Few candidates all see all of it."""
    shares = _SHARES if num_candidates > len(KINDS) else ()
    return [share for share in shares if share * num_requests >= _MIN_REQUESTS]


def compare(
    candidates: Sequence[Candidate], shares: Sequence[float], seeds: Sequence[int], evaluate: Evaluate
) -> list[Row]:
    """A row for each, the best first, those dropped early behind. The best of each kind is never dropped.

    Runs on `shares` of the workload take the first seed alone.
    """
    left = list(candidates)
    dropped: list[Row] = []
    for share in shares:
        rows = _run([(candidate, 1.0) for candidate in left], seeds[:1], share, evaluate)
        kept, worse = _halved(rows)
        left, dropped = [candidate for candidate in left if candidate in kept], worse + dropped
    rows = _run([(candidate, 1.0) for candidate in left], seeds, 1.0, evaluate)
    return _by_merit(rows) + dropped


def _by_merit(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.merit)


def _halved(rows: Iterable[Row]) -> tuple[set[Candidate], list[Row]]:
    """Who goes on, and the rows of the others, the best first."""
    ordered = _by_merit(rows)
    kept = {row.candidate for row in ordered[: math.ceil(len(ordered) / 2)]}
    kept |= {row.candidate for row in ordered if not _is_clearly_worse(row, ordered[0])}
    kept |= {row.candidate for row in map(best_of_kind, [ordered] * len(KINDS), KINDS) if row is not None}
    return kept, [_dropped(row) for row in ordered if row.candidate not in kept]


def _is_clearly_worse(row: Row, leader: Row) -> bool:
    if row.outcome.good_fraction < leader.outcome.good_fraction - _CLEAR_SHARE:
        return True
    return row.merit[0] >= leader.merit[0] and row.merit[1] > leader.merit[1] * _CLEAR_LATENCY


def _dropped(row: Row) -> Row:
    return Row(row.candidate, row.outcome, row.lowest_fraction, row.share, row.speedup, is_dropped=True)


def _run(tried: Sequence[tuple[Candidate, float]], seeds: Sequence[int], share: float, evaluate: Evaluate) -> list[Row]:
    """A row for each candidate and speed-up."""
    jobs = [Job(candidate, seed, share, speedup) for candidate, speedup in tried for seed in seeds]
    part = "all of the workload" if share == 1.0 else f"the first {share:.3g} of the workload"
    outcomes = evaluate(jobs, f"{len(tried)} configuration{'s' if len(tried) > 1 else ''} on {part}")
    rows = []
    for i, (candidate, speedup) in enumerate(tried):
        mine = outcomes[i * len(seeds) : (i + 1) * len(seeds)]
        lowest = min(outcome.good_fraction for outcome in mine)
        rows.append(Row(candidate, _mean(mine), lowest, share, speedup))
    return rows


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    def of(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(outcomes) else None

    return Outcome(
        num_requests=sum(outcome.num_requests for outcome in outcomes),
        good_fraction=of(outcome.good_fraction for outcome in outcomes) or 0.0,
        goodput_per_s=of(outcome.goodput_per_s for outcome in outcomes) or 0.0,
        ttft_mean_s=of(outcome.ttft_mean_s for outcome in outcomes),
        ttft_p99_s=of(outcome.ttft_p99_s for outcome in outcomes),
        tpot_p99_s=of(outcome.tpot_p99_s for outcome in outcomes),
        e2el_mean_s=of(outcome.e2el_mean_s for outcome in outcomes),
        num_flips=of(outcome.num_flips for outcome in outcomes) or 0.0,
        errors=tuple(dict.fromkeys(error for outcome in outcomes for error in outcome.errors))[:3],
    )


# --- the highest rate ----------------------------------------------------------------------------------------------


class Bracket:
    """Bisection, by ratios, of the highest speed-up that is good; above one that is not, none is taken to be."""

    def __init__(self, guess: float, step: float, tolerance: float) -> None:
        """Looks for bounds by `step` from `guess` on, and ends when they are within the ratio `tolerance`."""
        self.low: float | None = None
        self.high: float | None = None
        self._guess = guess
        self._step = step
        self._tolerance = tolerance

    def next(self) -> float | None:
        """What to try; None at the end."""
        if self.low is None and self.high is None:
            return self._guess
        if self.low is None:
            assert self.high is not None
            return self.high / self._step if self.high > 1 / MAX_SPEEDUP else None
        if self.high is None:
            return self.low * self._step if self.low < MAX_SPEEDUP else None
        return math.sqrt(self.low * self.high) if self.high / self.low > self._tolerance else None

    def tell(self, speedup: float, is_good: bool) -> None:
        if is_good:
            self.low = speedup
        else:
            self.high = speedup


def capacities(
    candidates: Sequence[Candidate],
    shares: Sequence[float],
    seeds: Sequence[int],
    target: float,
    evaluate: Evaluate,
) -> list[Row]:
    """The highest speed-up at which each keeps `target` of the requests within the SLO, to 2 %; the highest first.

    The last of `shares` of the workload, if there are any, says roughly first; then the lower half is dropped, but for
    what is within 25 % of the best or the best of its kind.
    """
    guesses = dict.fromkeys(candidates, 1.0)
    dropped: list[Row] = []
    if shares:
        brackets = {candidate: Bracket(1.0, 2.0, _COARSE) for candidate in candidates}
        rows = _bisected(brackets, seeds[:1], shares[-1], target, evaluate)
        kept = _faster_half(rows)
        guesses = {row.candidate: row.speedup or 1 / MAX_SPEEDUP for row in rows if row.candidate in kept}
        dropped = [_dropped(row) for row in rows if row.candidate not in kept]
    step = 1.15 if shares else 2.0
    brackets = {candidate: Bracket(guess, step, _FINE) for candidate, guess in guesses.items()}
    return _bisected(brackets, seeds, 1.0, target, evaluate) + dropped


def _faster_half(rows: Sequence[Row]) -> set[Candidate]:
    kept = {row.candidate for row in rows[: math.ceil(len(rows) / 2)]}
    kept |= {row.candidate for row in rows if row.speedup * _COARSE >= rows[0].speedup}
    return kept | {row.candidate for row in map(best_of_kind, [rows] * len(KINDS), KINDS) if row is not None}


def _bisected(
    brackets: dict[Candidate, Bracket], seeds: Sequence[int], share: float, target: float, evaluate: Evaluate
) -> list[Row]:
    """All of them a step at a time, so that processes have as much to do as there are candidates."""
    at_low: dict[Candidate, Row] = {}
    at_high: dict[Candidate, Row] = {}
    while tried := list(_next(brackets)):
        for row in _run(tried, seeds, share, evaluate):
            is_good = row.outcome.good_fraction >= target
            brackets[row.candidate].tell(row.speedup, is_good)
            (at_low if is_good else at_high)[row.candidate] = row
    rows = [at_low.get(candidate) or _never_good(at_high[candidate]) for candidate in brackets]
    return sorted(rows, key=lambda row: (-row.speedup, row.merit))


def _next(brackets: dict[Candidate, Bracket]) -> Iterator[tuple[Candidate, float]]:
    for candidate, bracket in brackets.items():
        if (speedup := bracket.next()) is not None:
            yield candidate, speedup


def _never_good(row: Row) -> Row:
    return Row(row.candidate, row.outcome, row.lowest_fraction, row.share, speedup=0.0)


# --- the fewest instances ------------------------------------------------------------------------------------------


def fewest(low: int, high: int, is_enough: Callable[[int], bool]) -> int | None:
    """The smallest number from `low` to `high` that is enough; None if none is. Takes it that more is never worse."""
    if not is_enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low
