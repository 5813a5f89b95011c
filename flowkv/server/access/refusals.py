"""What becomes known of HTTP requests that are turned away: a count of each, and a line now and then."""

import logging
import time
from collections.abc import Callable

from flowkv.throttle import Throttle

_logger = logging.getLogger(__name__)


class Refusals:
    def __init__(self, count: Callable[[int, str], None]) -> None:
        """`count(status, reason)` is called for each."""
        self._count = count
        self._throttle = Throttle()

    def note_bug(self, path: str, bug: Exception) -> None:
        """Of ours, while it was decided who may come in; nobody has."""
        self._count(500, "internal_error")
        if (more := self._throttle.note("internal_error", time.monotonic())) is not None:
            _logger.error("a bug has turned somebody away from %s%s", f"{path!a:.100}", more, exc_info=bug)

    def note(self, status: int, reason: str, address: str, what: str = "") -> None:
        """`reason` is a code of ours. `what` may quote what a client has sent, escaped."""
        self._count(status, reason)
        if (more := self._throttle.note(reason, time.monotonic())) is not None:
            _logger.warning("turned away %s: %s%s%s", address, reason, what and f": {what}", more)
