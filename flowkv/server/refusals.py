"""What becomes known of those who are turned away: a count of each, and a line now and then.

A log is no place that strangers may flood: each reason is said at once, and then with a count every while.
"""

import logging
import time
from collections.abc import Callable

_INTERVAL_S = 10.0

_logger = logging.getLogger(__name__)


class Throttle:
    """`reasons` are few: codes of errors."""

    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._said_s: dict[str, float] = {}
        self._num_unsaid: dict[str, int] = {}

    def note(self, reason: str, now_s: float) -> int | None:
        """How many went unsaid since the last line, if this one is to be said; else None."""
        if now_s - self._said_s.get(reason, float("-inf")) < self._interval_s:
            self._num_unsaid[reason] = self._num_unsaid.get(reason, 0) + 1
            return None
        self._said_s[reason] = now_s
        return self._num_unsaid.pop(reason, 0)


class Refusals:
    def __init__(self, count: Callable[[int, str], None]) -> None:
        """`count(status, reason)` is called for each."""
        self._count = count
        self._throttle = Throttle()

    def note(self, status: int, reason: str, address: str, what: str = "") -> None:
        """`reason` is a code of ours. `what` may quote what a client has sent, escaped."""
        self._count(status, reason)
        if (num_unsaid := self._throttle.note(reason, time.monotonic())) is not None:
            more = f" (and {num_unsaid} more since the last line like this)" if num_unsaid else ""
            _logger.warning("turned away %s: %s%s%s", address, reason, what and f": {what}", more)
