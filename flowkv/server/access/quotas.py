"""How much one key, or all together, may ask for: requests at once, requests and tokens a minute.

Decided when the head of an HTTP request is there, before its body is read: turning one away costs nothing. So tokens
are not asked for in advance. A bucket is charged with the prompt once it is counted and with each output token when it
comes, and may be overdrawn: who has taken too much waits until that is made good. In the long run nobody gets more than
the rate, and a client that leaves `max_tokens` open pays for what came, not for what could have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

_MINUTE_S = 60.0
_SOME_S = 1.0  # when one of those that run may have ended


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """0: no limit."""

    concurrent: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, and in how many seconds it may be otherwise."""

    reason: str
    retry_after_s: float


class Bucket:
    """Holds a minute's worth at most, fills at an even rate, and may be overdrawn."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._seen_s = -math.inf

    def change(self, per_minute: int) -> None:
        """What is left stays, and so does what is overdrawn."""
        self.per_minute = per_minute
        self._level = min(self._level, float(per_minute))

    def level(self, now_s: float) -> float:
        if now_s > self._seen_s:
            gained = (now_s - self._seen_s) * self.per_minute / _MINUTE_S
            self._level = min(float(self.per_minute), self._level + gained)
            self._seen_s = now_s
        return self._level

    def take(self, amount: float, now_s: float) -> None:
        self._level = self.level(now_s) - amount

    def wait_s(self, now_s: float) -> float:
        """Until there is one to take."""
        return max(0.0, 1.0 - self.level(now_s)) * _MINUTE_S / self.per_minute

    def full_s(self, now_s: float) -> float:
        """Until nothing is missing."""
        return (self.per_minute - self.level(now_s)) * _MINUTE_S / self.per_minute


class Quota:
    """One holder's limits, and what is left of them."""

    def __init__(self, limits: QuotaLimits) -> None:
        self.limits = limits
        self.num_inside = 0
        self.requests = Bucket(limits.requests_per_minute) if limits.requests_per_minute else None
        self.tokens = Bucket(limits.tokens_per_minute) if limits.tokens_per_minute else None

    def change(self, limits: QuotaLimits) -> None:
        """From now on; what is inside and what is used up stays."""
        self.limits = limits
        self.requests = _changed(self.requests, limits.requests_per_minute)
        self.tokens = _changed(self.tokens, limits.tokens_per_minute)

    def refusal(self, now_s: float) -> Refusal | None:
        """Why nothing more may come in now; None if it may."""
        limits = self.limits
        if limits.concurrent and self.num_inside >= limits.concurrent:
            return Refusal(f"{self.num_inside} requests are under way, which is the limit", _SOME_S)
        for bucket, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s(now_s)) > 0.0:
                return Refusal(f"the limit of {bucket.per_minute} {what} a minute is used up", wait_s)
        return None

    def enter(self, now_s: float) -> None:
        self.num_inside += 1
        if self.requests is not None:
            self.requests.take(1, now_s)

    def leave(self) -> None:
        self.num_inside -= 1

    def spend(self, num_tokens: int, now_s: float) -> None:
        if self.tokens is not None:
            self.tokens.take(num_tokens, now_s)

    def headers(self, now_s: float) -> list[tuple[bytes, bytes]]:
        """As OpenAI's: the limit, what is left of it, and when all of it is there again."""
        found: list[tuple[bytes, bytes]] = []
        for bucket, what in ((self.requests, b"requests"), (self.tokens, b"tokens")):
            if bucket is not None:
                left = max(0, math.floor(bucket.level(now_s)))
                found.append((b"x-ratelimit-limit-" + what, b"%d" % bucket.per_minute))
                found.append((b"x-ratelimit-remaining-" + what, b"%d" % left))
                found.append((b"x-ratelimit-reset-" + what, b"%.3fs" % bucket.full_s(now_s)))
        return found


class Quotas:
    """Those of every key by name, and that of all together."""

    def __init__(self, everybody: QuotaLimits, each: QuotaLimits) -> None:
        self.everybody = Quota(everybody)
        self._each = each
        self._of: dict[str, tuple[Mapping[str, int], Quota]] = {}

    def of(self, name: str, own: Mapping[str, int]) -> Quota:
        """`own`: where a key's limits differ from those of each key."""
        found = self._of.get(name)
        if found is not None and found[0] == own:
            return found[1]
        limits = replace(self._each, **own)
        quota = Quota(limits) if found is None else found[1]
        quota.change(limits)
        self._of[name] = (own, quota)
        return quota


def _changed(bucket: Bucket | None, per_minute: int) -> Bucket | None:
    if bucket is None or not per_minute:
        return Bucket(per_minute) if per_minute else None
    bucket.change(per_minute)
    return bucket
