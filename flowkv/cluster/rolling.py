"""A rolling restart: instances one after another, each when the successor of the one before is in service."""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto

from flowkv.cluster.load import InstanceView
from flowkv.messages import seat_of
from flowkv.types import RollingRestart

SUCCESSOR_TIMEOUT_S = 900.0  # loading a large model takes minutes


class _Phase(Enum):
    DRAINING = auto()
    STARTING = auto()  # its process is being ended, and its successor is awaited


class Rolling:
    """`drain` is called with an instance that is to finish what it has, and `restart` when it has, or after
    `drain_timeout_s`: what it still holds then goes on elsewhere.

    If a successor does not come, the instances that were to follow are left as they are.
    """

    def __init__(
        self, drain_timeout_s: float, drain: Callable[[InstanceView], None], restart: Callable[[InstanceView], None]
    ) -> None:
        self._drain_timeout_s = drain_timeout_s
        self._drain = drain
        self._restart = restart
        self._waiting: list[str] = []
        self._current: str | None = None
        self._phase = _Phase.DRAINING
        self._due_s = 0.0
        self._token = ""
        self._num_done = 0
        self._failure: str | None = None

    @property
    def is_active(self) -> bool:
        return self._current is not None or bool(self._waiting)

    def holds(self, name: str) -> bool:
        """Whether it is its turn, or will be: it is drained to be followed by another, not to be retired."""
        return name == self._current or name in self._waiting

    def ask(self, names: Iterable[str], token: str = "") -> None:
        """These too. `token` names what was asked last."""
        if not self.is_active:
            self._num_done, self._failure = 0, None
        self._token = token or self._token
        self._waiting += [name for name in dict.fromkeys(names) if name not in self._waiting and name != self._current]

    def forget(self, name: str) -> None:
        """Nobody will take its place."""
        self._waiting = [waiting for waiting in self._waiting if waiting != name]
        if self._current == name:
            self._current = None

    def look(self, views: Mapping[str, InstanceView], now_s: float) -> None:
        """Called often."""
        if self._current is None:
            self._begin_next(views, now_s)
        elif self._phase is _Phase.DRAINING:
            self._look_drained(self._current, views, now_s)
        else:
            self._look_succeeded(self._current, views, now_s)

    def status(self) -> RollingRestart:
        phase = "" if self._current is None else self._phase.name.lower()
        return RollingRestart(
            self._token, self._current or "", phase, self._num_done, len(self._waiting), self._failure or ""
        )

    def _begin_next(self, views: Mapping[str, InstanceView], now_s: float) -> None:
        while self._waiting and self._current is None:
            view = views.get(self._waiting.pop(0))
            if view is not None and not view.is_stopping:  # else it has ended, or does so for good
                self._current, self._phase = view.name, _Phase.DRAINING
                self._due_s = now_s + self._drain_timeout_s
                self._drain(view)

    def _look_drained(self, name: str, views: Mapping[str, InstanceView], now_s: float) -> None:
        view = views.get(name)
        if view is not None and not view.holds_nothing and now_s < self._due_s:
            return
        if view is not None:
            self._restart(view)
        self._phase, self._due_s = _Phase.STARTING, now_s + SUCCESSOR_TIMEOUT_S

    def _look_succeeded(self, name: str, views: Mapping[str, InstanceView], now_s: float) -> None:
        """Whoever is in its seat by now."""
        if any(
            view.is_in_service and seat_of(view.name) == seat_of(name) for view in views.values() if view.name != name
        ):
            self._current = None
            self._num_done += 1
        elif now_s >= self._due_s:
            self._failure = f"no successor of {name} is in service"
            self._current = None
            self._waiting.clear()
