"""The links of one instance: whom it can write to, how, and what has gone over each."""

from dataclasses import dataclass

from flowkv.transfer.base import Linked
from flowkv.types import LinkStatus

_FAILURE = 0.5  # what is left of a link's health after a write that failed
_WORTH_A_TRY = 0.3
_HEALTHY = 0.99
_HALF_LIFE_S = 5.0  # of what is missing to full health


@dataclass(slots=True)
class _Link:
    backend: str
    num_bytes: int = 0
    num_calls: int = 0
    seconds: float = 0.0
    health: float = 1.0
    best_bytes_per_s: float = 0.0


class Links:
    """A peer is in here from when its pool can be written to until it is dead.

    A write that fails halves a link's health, which comes back with time whatever happens. A link that has failed a few
    times lately is left alone until then: what would go over it is decoded where it was prefilled.
    """

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}
        self._changed: dict[str, None] = {}  # peers whose link has news, in the order of the first

    def up(self, linked: Linked) -> None:
        self._links[linked.peer] = _Link(linked.backend)
        self._changed[linked.peer] = None

    def down(self, peer: str) -> None:
        self._links.pop(peer, None)
        self._changed.pop(peer, None)

    def backend(self, peer: str) -> str | None:
        """None where the link is not up."""
        link = self._links.get(peer)
        return None if link is None else link.backend

    def is_up(self, peer: str) -> bool:
        return peer in self._links

    def is_good(self, peer: str) -> bool:
        """Up, and worth a try."""
        link = self._links.get(peer)
        return link is not None and link.health >= _WORTH_A_TRY

    def failed(self, peer: str) -> None:
        """A write could not be made."""
        if (link := self._links.get(peer)) is not None:
            link.health *= _FAILURE
            self._changed[peer] = None

    def pass_time(self, elapsed_s: float) -> None:
        for peer, link in self._links.items():
            if link.health < _HEALTHY:
                link.health = 1 - (1 - link.health) * 0.5 ** (elapsed_s / _HALF_LIFE_S)
                self._changed[peer] = None
            elif link.health < 1.0:
                link.health = 1.0
                self._changed[peer] = None

    def count(self, peer: str, num_bytes: int, num_calls: int, seconds: float) -> None:
        """Something was written to a peer, dead or alive."""
        if (link := self._links.get(peer)) is not None:
            link.num_bytes += num_bytes
            link.num_calls += num_calls
            link.seconds += seconds
            if seconds > 0.0:
                link.best_bytes_per_s = max(link.best_bytes_per_s, num_bytes / seconds)
            self._changed[peer] = None

    def tell_all(self) -> None:
        """Somebody knows of none of them."""
        self._changed = dict.fromkeys(self._links)

    def take_changed(self) -> list[LinkStatus]:
        """Those that came up or moved something since the last call."""
        changed, self._changed = self._changed, {}
        return [self._status(peer, self._links[peer]) for peer in changed]

    def _status(self, peer: str, link: _Link) -> LinkStatus:
        return LinkStatus(
            peer=peer, backend=link.backend, num_bytes=link.num_bytes, num_calls=link.num_calls, seconds=link.seconds,
            health=link.health, best_bytes_per_s=link.best_bytes_per_s,
        )  # fmt: skip
