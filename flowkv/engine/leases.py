"""How long instances bear with each other's silence. Time is what this instance has been awake for.

One that was stopped cannot tell who was silent meanwhile, since what it was sent waits to be read: a long gap between
two looks at the clock counts as a short one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

_LEASE_STEPS = 4  # an instance says nothing during a step: a lease holds so many of its slowest recent ones
_FORGET = 0.95  # what is left of a slow step's length after each later one
_BEATS = 3  # in a lease


class LeaseClock:
    """This instance's own lease, in seconds, and the time that passes for those of others."""

    def __init__(self, lease_s: float) -> None:
        self._configured_s = lease_s
        self._slowest_step_s = 0.0
        self._last_s: float | None = None
        self.now_s = 0.0  # when the engine was last called

    @property
    def lease_s(self) -> float:
        return max(self._configured_s, _LEASE_STEPS * self._slowest_step_s)

    @property
    def beat_s(self) -> float:
        """Between two repetitions of what is not answered, or two renewals: some may be lost before a lease is."""
        return self._configured_s / _BEATS

    def stepped(self, seconds: float) -> None:
        self._slowest_step_s = max(seconds, _FORGET * self._slowest_step_s)

    def elapsed_s(self, now_s: float) -> float:
        """Since the last call."""
        gap_s = 0.0 if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        return min(gap_s, self.lease_s / _BEATS)


@dataclass(slots=True)
class _Watch:
    lease_s: float = 0.0  # what the peer has asked for
    silent_s: float = 0.0
    unrenewed_s: float = 0.0


class Watches:
    """The peers that have something of this instance's open: who has been silent for a lease, whom to tell of ours."""

    def __init__(self, clock: LeaseClock) -> None:
        self._clock = clock
        self._watches: dict[str, _Watch] = {}

    @property
    def is_empty(self) -> bool:
        return not self._watches

    def heard(self, peer: str, lease_s: float = 0.0) -> None:
        """A message of `peer` has come; it may be silent for `lease_s`, where it says so."""
        if (watch := self._watches.get(peer)) is not None:
            watch.silent_s = 0.0
            watch.lease_s = lease_s or watch.lease_s

    def is_silent(self, peer: str) -> bool:
        watch = self._watches.get(peer)
        return watch is not None and watch.silent_s >= max(self._clock.lease_s, watch.lease_s)

    def tick(self, elapsed_s: float, peers: Iterable[str]) -> list[str]:
        """Time passes for `peers`, all there are to watch; those to whom `Renew` is due."""
        self._watches = {peer: self._watches.get(peer) or _Watch() for peer in peers}
        due = []
        for peer, watch in self._watches.items():
            watch.silent_s += elapsed_s
            watch.unrenewed_s += elapsed_s
            if watch.unrenewed_s >= self._clock.beat_s:
                watch.unrenewed_s = 0.0
                due.append(peer)
        return due
