"""Virtual time: what happens next, and when."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Loop:
    """Events in the order of their times; those of one time in the order in which they were put down.

    Nothing here knows the real clock, so the same events happen at the same times on any machine.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._order = count()
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, time_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call this then. The past cannot be changed: a time before now is now."""
        heapq.heappush(self._heap, (max(time_s, self.now_s), next(self._order), call, arguments))

    def after(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (self.now_s + delay_s, next(self._order), call, arguments))

    def step(self) -> bool:
        """Let one thing happen. False if nothing is left."""
        if not self._heap:
            return False
        self.now_s, _, call, arguments = heapq.heappop(self._heap)
        self.num_events += 1
        call(*arguments)
        return True
