"""What the user is told of an instance's links: which there are, by which backend, and which are wanting."""

from flowkv.transfer.base import Linked

_SLOW_S = 5.0  # a link on one node takes milliseconds, one between nodes up to a second or two


class LinkNotes:
    """One line for each link of `instance` that comes up, fails, or takes long; `take` gives them out."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._begun_s: dict[str, float] = {}  # by peer, of links that are neither up nor known to be slow
        self._lines: list[str] = []

    def begun(self, peer: str, now_s: float) -> None:
        self._begun_s[peer] = now_s

    def up(self, linked: Linked) -> None:
        self._begun_s.pop(linked.peer, None)
        self._add(linked.peer, linked.backend)

    def failed(self, peer: str, reason: str) -> None:
        self._begun_s.pop(peer, None)
        self._add(peer, f"no link: {reason}")

    def gone(self, peer: str) -> None:
        self._begun_s.pop(peer, None)

    def tick(self, now_s: float) -> None:
        for peer in [peer for peer, begun_s in self._begun_s.items() if now_s - begun_s >= _SLOW_S]:
            del self._begun_s[peer]
            reason = "the peer is stopped, or what KV moves over does not reach it (firewall, UCX_NET_DEVICES)"
            self._add(peer, f"no link after {_SLOW_S:.0f} s, still trying: {reason}")

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def _add(self, peer: str, text: str) -> None:
        self._lines.append(f"{self._instance} -> {peer}  {text}")
