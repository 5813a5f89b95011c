"""What a launcher has to do at some later time."""

from collections.abc import Callable


class Timers:
    def __init__(self) -> None:
        self._due: list[tuple[float, Callable[[], None]]] = []

    def at(self, due_s: float, act: Callable[[], None]) -> None:
        self._due.append((due_s, act))

    def next_s(self, now_s: float) -> float | None:
        """Seconds until the next one; None if there is none."""
        return max(0.0, min(due_s for due_s, _ in self._due) - now_s) if self._due else None

    def run_due(self, now_s: float) -> None:
        due = [act for due_s, act in self._due if due_s <= now_s]
        self._due = [(due_s, act) for due_s, act in self._due if due_s > now_s]
        for act in due:
            act()

    def clear(self) -> None:
        self._due.clear()
