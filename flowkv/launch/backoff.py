"""When what has ended is started again, and when no more."""

PROGRESS_S = 10.0  # in service for so long is progress too, even if there was nothing to do
_MAX_DOUBLINGS = 16  # more would only make numbers too large


class Backoff:
    """Of a process and its successors, one after another; the same object for all of them.

    One that ends after it has made progress is followed at once: it has worked (computed a step, say), or was in
    service for PROGRESS_S. Ends without progress are failures: after the first in a row the next one follows at once,
    then after 1, 2, 4 ... seconds, `max_delay_s` at most, and after `max_failures` none does. (0: none ever does.)
    """

    def __init__(self, max_failures: int, max_delay_s: float) -> None:
        self.num_failures = 0  # in a row
        self._max_failures = max_failures
        self._max_delay_s = max_delay_s
        self._ready_s: float | None = None
        self._has_worked = False

    def ready(self, now_s: float) -> None:
        """The present one is in service."""
        self._ready_s = now_s

    def worked(self) -> None:
        self._has_worked = True

    def ended(self, now_s: float) -> float | None:
        """Seconds until the next one is to be started; None: it is given up."""
        has_served = self._ready_s is not None and now_s - self._ready_s >= PROGRESS_S
        self.num_failures = 0 if self._has_worked or has_served else self.num_failures + 1
        self._ready_s, self._has_worked = None, False
        if self.num_failures >= self._max_failures:
            return None
        return self.delay_s

    @property
    def delay_s(self) -> float:
        """Before the next one, after so many failures."""
        if self.num_failures <= 1:
            return 0.0
        return min(self._max_delay_s, 2.0 ** min(self.num_failures - 2, _MAX_DOUBLINGS))

    def describe(self) -> str:
        """What a user should know of it, after `ended`."""
        soon = "starting it again" if not self.delay_s else f"starting it again in {self.delay_s:g} s"
        if self.num_failures <= 1:
            return soon
        return f"{soon} (failure {self.num_failures} of at most {self._max_failures} without progress)"

    def describe_end(self) -> str:
        if self._max_failures == 0:
            return "restart.max_failures is 0"
        return f"{self.num_failures} times in a row without progress"
