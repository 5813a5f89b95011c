"""The requests that ended lately, and who wants to hear of each."""

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence

from flowkv.server.records.timeline import RequestRecord

Listener = Callable[[RequestRecord], None]

NUM_SLOWEST = 32
SLOWEST_WINDOW_S = 600.0


class Journal:
    """Keeps the last `num_kept` records, and the slowest of the last ten minutes, however many there were since."""

    def __init__(self, num_kept: int, listeners: Sequence[Listener] = ()) -> None:
        self._recent: deque[RequestRecord] = deque(maxlen=num_kept)
        self._slowest: list[RequestRecord] = []  # the fastest of them first
        self._listeners = list(listeners)

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def add(self, record: RequestRecord) -> None:
        self._recent.append(record)
        self._keep_if_slow(record)
        for listener in self._listeners:
            listener(record)

    @property
    def recent(self) -> list[RequestRecord]:
        """The latest first."""
        return list(reversed(self._recent))

    def slowest(self, now_at: float) -> list[RequestRecord]:
        """Of those that came in the ten minutes before `now_at` (Unix time), the slowest first."""
        return [record for record in reversed(self._slowest) if record.arrived_at > now_at - SLOWEST_WINDOW_S]

    def _keep_if_slow(self, record: RequestRecord) -> None:
        if len(self._slowest) == NUM_SLOWEST and record.elapsed_s <= self._slowest[0].elapsed_s:
            oldest_at = record.arrived_at - SLOWEST_WINDOW_S
            if all(kept.arrived_at > oldest_at for kept in self._slowest):
                return
            self._slowest = [kept for kept in self._slowest if kept.arrived_at > oldest_at]
        insort(self._slowest, record, key=lambda kept: kept.elapsed_s)
        del self._slowest[:-NUM_SLOWEST]
