"""Who leans to which phase: the paper's three regimes (FlowKV, Algorithm 1) with a rule for each.

Every instance is rated by what it could do of either phase, in shares of the work that comes: a prefill rating of 0.25
means that it alone could compute a quarter of the prompts as they arrive. Roles are good when neither phase is short:
when the larger of the two utilisations is small. They are changed when another division is clearly better, on two
looks in a row, and not soon after they were changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from flowkv.types import Regime, Role

_BETTER = 1.15  # times as good another division must be
_LOOKS = 2  # in a row
_STICKY = 1.2  # what an instance's present role is worth in the order of instances
_BUSY = 0.5  # utilisation below which nothing is short, and roles stay
_ALL_MIXED = 0.9  # utilisation of the whole cluster from which on nobody can be spared for one phase alone
_SMOOTHING = 0.05  # weight of a look
_MAX_PRESSURE = 2.0  # as much counts of a moment
_SPLIT_AGAIN = 0.7  # and below which roles are divided again
_FULL = 1.0  # utilisation of the whole cluster from which on it is overloaded
_SLACK = 0.35  # and below which it is underloaded
_OVERLOADED_LOOKS = 6
_UNDERLOADED_LOOKS = 40


@dataclass(frozen=True, slots=True)
class Rating:
    """What one instance could do, as shares of all the work that comes."""

    name: str
    role: Role
    prefill: float
    decode: float
    load: float  # what it holds now; the least loaded change first
    may_flip: bool  # it has been in its role for long enough, and has proved that it is in it


class Flip(NamedTuple):
    """A role that was changed, once the instance has proved it."""

    time_s: float
    instance: str
    old: Role
    new: Role
    regime: Regime


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look found."""

    regime: Regime
    flips: list[tuple[str, Role]] = field(default_factory=list)
    scale: int = 0  # instances to add (1) or to retire (-1)


class RolePolicy:
    """Looks at the cluster at a beat; remembers only for how long it has seen the same."""

    def __init__(self) -> None:
        self._division: dict[str, Role] = {}  # that was better at the last look
        self._num_looks = 0
        self._pressure = 0.0  # total utilisation, smoothed
        self._has_mixed = False  # everyone does both because this policy wanted it
        self._overloaded_looks = 0
        self._underloaded_looks = 0

    def look(self, ratings: Sequence[Rating]) -> Verdict:
        """`ratings` of every instance that takes requests."""
        if not ratings:
            return Verdict(Regime.NORMAL)
        now = utilisation(ratings, {r.name: r.role for r in ratings})
        least = total_utilisation(ratings)
        self._pressure += _SMOOTHING * (min(least, _MAX_PRESSURE) - self._pressure)
        self._count(least)
        flips = self._flips(ratings, now) if len(ratings) > 1 else _alone(ratings[0])
        regime = self._regime(now, least, bool(flips))
        scale = 0
        if self._overloaded_looks >= _OVERLOADED_LOOKS:
            self._overloaded_looks, scale = 0, 1
        elif self._underloaded_looks >= _UNDERLOADED_LOOKS:
            self._underloaded_looks, scale = 0, -1
        return Verdict(regime, flips, scale)

    def _count(self, least: float) -> None:
        self._overloaded_looks = self._overloaded_looks + 1 if least > _FULL else 0
        self._underloaded_looks = self._underloaded_looks + 1 if least < _SLACK else 0

    @staticmethod
    def _regime(now: float, least: float, has_flips: bool) -> Regime:
        if least > _FULL:
            return Regime.OVERLOADED
        if has_flips or now > _FULL:
            return Regime.IMBALANCED
        return Regime.UNDERLOADED if least < _SLACK else Regime.NORMAL

    def _best(self, ratings: Sequence[Rating]) -> dict[str, Role]:
        """Everyone does both where there is no slack: a division always leaves some, on one side or the other."""
        bound = _SPLIT_AGAIN if self._has_mixed else _ALL_MIXED
        return {r.name: Role.MIXED for r in ratings} if self._pressure >= bound else best_division(ratings)

    def _flips(self, ratings: Sequence[Rating], now: float) -> list[tuple[str, Role]]:
        """Towards the best division, once it was better for some looks in a row."""
        division = self._best(ratings)
        is_mixing = set(division.values()) == {Role.MIXED}
        must = is_mixing or self._has_mixed  # one way or back: utilisations do not tell
        if not must and (now < _BUSY or utilisation(ratings, division) * _BETTER > now):
            self._num_looks = 0
            return []
        is_same_way = _num_prefill(division) - _num_prefill(self._division)
        self._num_looks = self._num_looks + 1 if self._num_looks == 0 or abs(is_same_way) <= 1 else 1
        self._division = division
        if self._num_looks < _LOOKS:
            return []
        self._num_looks = 0
        flips = [(r.name, division[r.name]) for r in ratings if r.may_flip and division[r.name] is not r.role]
        after = {r.name: r.role for r in ratings} | dict(flips)
        if not must and utilisation(ratings, after) >= now:
            return []
        self._has_mixed = is_mixing
        return flips


def utilisation(ratings: Sequence[Rating], roles: dict[str, Role]) -> float:
    """Of the phase that is shorter of instances, were these the roles; a mixed one gives what one phase leaves over.

    0 where nothing comes.
    """
    prefill = sum(r.prefill for r in ratings if roles[r.name] is Role.PREFILL)
    decode = sum(r.decode for r in ratings if roles[r.name] is Role.DECODE)
    mixed = [r for r in ratings if roles[r.name] is Role.MIXED]
    if not mixed:
        return max(_over(1.0, prefill), _over(1.0, decode))
    low, high = 0.0, total_utilisation(mixed)  # were the others to do nothing
    for _ in range(30):  # the least u such that the mixed have time for what the others leave undone at u
        u = (low + high) / 2
        left_prefill, left_decode = max(0.0, 1 - u * prefill), max(0.0, 1 - u * decode)
        low, high = (low, u) if _fits(mixed, left_prefill, left_decode, u) else (u, high)
    return high


def total_utilisation(ratings: Sequence[Rating]) -> float:
    """Of the whole cluster, were every instance to do both phases."""
    return _over(1.0, sum(r.prefill for r in ratings)) + _over(1.0, sum(r.decode for r in ratings))


def best_division(ratings: Sequence[Rating]) -> dict[str, Role]:
    """The roles with the least utilisation. At least one instance for each phase.

    Instances are put in the order of what they do better, so that different hardware finds its phase; those that are
    equal stay in the role that they have, and of these the least loaded change first. Where one instance is left for a
    phase that needs little of it, it does both.
    """
    ordered = sorted(ratings, key=_preference, reverse=True)
    prefill = [0.0, *accumulate(r.prefill for r in ordered)]
    decode = [0.0, *accumulate(r.decode for r in reversed(ordered))][::-1]

    def short(count: int) -> float:
        return max(_over(1.0, prefill[count]), _over(1.0, decode[count]))

    count = min(range(1, len(ordered)), key=short)
    division = {r.name: Role.PREFILL if i < count else Role.DECODE for i, r in enumerate(ordered)}
    options = [division]
    if count == len(ordered) - 1:
        options.append(division | {ordered[-1].name: Role.MIXED})
    if count == 1:
        options.append(division | {ordered[0].name: Role.MIXED})
    return min(options, key=_sticky_utilisation(ratings))


def _sticky_utilisation(ratings: Sequence[Rating]) -> Callable[[dict[str, Role]], float]:
    """Doing both costs something that the ratings do not see: it must be clearly better."""

    def of(division: dict[str, Role]) -> float:
        penalty = _BETTER if Role.MIXED in division.values() else 1.0
        return utilisation(ratings, division) * penalty

    return of


def _preference(rating: Rating) -> tuple[float, float]:
    """How much better it is at prefill than at decode; its present role counts, and then its load."""
    ratio = rating.prefill / rating.decode if rating.decode > 0 else 1.0
    if rating.role is Role.PREFILL:
        return ratio * _STICKY, rating.load
    return (ratio / _STICKY if rating.role is Role.DECODE else ratio), -rating.load


def _fits(mixed: Sequence[Rating], prefill: float, decode: float, u: float) -> bool:
    """Whether these do so much of both phases at this utilisation."""
    of_prefill, of_decode = sum(r.prefill for r in mixed), sum(r.decode for r in mixed)
    return _over(prefill, of_prefill) + _over(decode, of_decode) <= u


def _over(work: float, capacity: float) -> float:
    return work / capacity if capacity > 0 else (0.0 if work <= 0 else 1e9)


def _alone(rating: Rating) -> list[tuple[str, Role]]:
    return [(rating.name, Role.MIXED)] if rating.role is not Role.MIXED and rating.may_flip else []


def _num_prefill(division: dict[str, Role]) -> int:
    return sum(role is Role.PREFILL for role in division.values())
