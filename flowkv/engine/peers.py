"""Where other instances are reached, from an engine's point of view."""

from collections.abc import Sequence

from flowkv.engine.effects import Send
from flowkv.errors import ProtocolError
from flowkv.messages import Message, PeerInfo


class Peers:
    """Messages to a peer that has not been introduced yet are held until it is (its own message may overtake the
    controller's); those to a dead one are dropped, since its death settles whatever they were about."""

    def __init__(self) -> None:
        self._up: dict[str, PeerInfo] = {}
        self._held: dict[str, list[Message]] = {}
        self._dead: set[str] = set()  # names are never reused

    def up(self, peer: PeerInfo) -> list[Send]:
        """A peer is introduced: what was held for it goes out now."""
        self._up[peer.instance] = peer
        return [Send(peer.address, message) for message in self._held.pop(peer.instance, [])]

    def down(self, name: str) -> PeerInfo | None:
        """A peer is dead; who it was, if it had been introduced."""
        self._dead.add(name)
        self._held.pop(name, None)
        return self._up.pop(name, None)

    def is_up(self, name: str) -> bool:
        return name in self._up

    def is_dead(self, name: str) -> bool:
        return name in self._dead

    def check_blocks(self, name: str, block_ids: Sequence[int]) -> None:
        """Raises ProtocolError unless they are blocks of that peer's pool, none of them twice."""
        if (peer := self._up.get(name)) is None:
            return
        if len(set(block_ids)) != len(block_ids) or any(not 0 <= b < peer.pool.num_blocks for b in block_ids):
            raise ProtocolError(f"{name} reserved blocks that its pool of {peer.pool.num_blocks} has not")

    def send(self, name: str, message: Message) -> list[Send]:
        if (peer := self._up.get(name)) is not None:
            return [Send(peer.address, message)]
        if name not in self._dead:
            self._held.setdefault(name, []).append(message)
        return []
