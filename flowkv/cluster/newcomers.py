"""Instances that have registered and are not in service yet: the first request must not wait for a connection."""

from collections.abc import Callable, Mapping

from flowkv.cluster.load import InstanceView
from flowkv.messages import LoadReport


class Newcomers:
    """`admit` is called with each when it and every other instance in service can write to each other.

    Links to a stalled instance come up when it is back.
    """

    def __init__(self, views: Mapping[str, InstanceView], admit: Callable[[InstanceView], None]) -> None:
        self._views = views
        self._admit = admit
        self._missing: dict[str, set[str]] = {}  # by newcomer: those in service with which it has no links yet

    def add(self, name: str) -> None:
        """It has registered, and the others are told of it."""
        self._missing[name] = {view.name for view in self._views.values() if view.is_available and view.name != name}
        self._admit_complete()

    def forget(self, name: str) -> None:
        """Nobody waits for it any more."""
        self._missing.pop(name, None)
        for missing in self._missing.values():
            missing.discard(name)
        self._admit_complete()

    def note_links(self, message: LoadReport) -> None:
        """Links that came up may be the last that a newcomer waited for."""
        if not self._missing:
            return
        mine = self._views[message.instance]
        for link in message.links:
            other = self._views.get(link.peer)
            if other is not None and other.is_linked_to(mine):
                for one, two in ((mine.name, other.name), (other.name, mine.name)):
                    self._missing.get(one, set()).discard(two)
        self._admit_complete()

    def _admit_complete(self) -> None:
        for name in [name for name, missing in self._missing.items() if not missing]:
            if not self._missing[name]:  # one that was just admitted may be missing to it
                self._admit_one(self._views[name])

    def _admit_one(self, newcomer: InstanceView) -> None:
        del self._missing[newcomer.name]
        newcomer.is_in_service = True
        for name, missing in self._missing.items():
            other = self._views[name]
            if not (other.is_linked_to(newcomer) and newcomer.is_linked_to(other)):
                missing.add(newcomer.name)
        self._admit(newcomer)
