"""Where other instances are reached, from an engine's point of view."""

from flowkv.engine.effects import Send
from flowkv.messages import Message


class PeerAddresses:
    """Messages to a peer that has not been introduced yet are held until it is (its own message may overtake the
    controller's); those to a dead one are dropped, since its death settles whatever they were about."""

    def __init__(self) -> None:
        self._address: dict[str, str] = {}
        self._held: dict[str, list[Message]] = {}
        self._dead: set[str] = set()  # names are never reused

    def up(self, name: str, address: str) -> list[Send]:
        """A peer is introduced: what was held for it goes out now."""
        self._address[name] = address
        return [Send(address, message) for message in self._held.pop(name, [])]

    def down(self, name: str) -> None:
        self._dead.add(name)
        self._address.pop(name, None)
        self._held.pop(name, None)

    def send(self, name: str, message: Message) -> list[Send]:
        if (address := self._address.get(name)) is not None:
            return [Send(address, message)]
        if name not in self._dead:
            self._held.setdefault(name, []).append(message)
        return []
