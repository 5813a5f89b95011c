"""What an engine wants done; the shell around it (a process, the simulator, a test) does it."""

from dataclasses import dataclass

from flowkv.kv.blocks import BlockCopy
from flowkv.messages import Message, PeerInfo
from flowkv.transfer.plan import Run


@dataclass(frozen=True, slots=True)
class Send:
    address: str
    message: Message


@dataclass(frozen=True, slots=True)
class Write:
    """Write runs of this instance's blocks into a peer's pool; `Engine.on_written(ticket)` when that is done."""

    ticket: int
    peer: str
    runs: list[Run]
    immediate: int


@dataclass(frozen=True, slots=True)
class MoveBlocks:
    """Copy blocks (source, destination) of this pool now, before any later effect is carried out: no step is under
    way, and whoever reads them will look at the destinations."""

    copies: tuple[BlockCopy, ...]


@dataclass(frozen=True, slots=True)
class CancelWrite:
    """Nobody wants this `Write` any more; `Engine.on_written(ticket)` says when it is over."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Expect:
    """Blocks will arrive under `immediate`. Comes before the message that tells the peer of it."""

    immediate: int


@dataclass(frozen=True, slots=True)
class Forget:
    """No more blocks will arrive under `immediate`."""

    immediate: int


@dataclass(frozen=True, slots=True)
class Connect:
    """Make a link into a peer's pool; `Engine.on_linked` when it is there."""

    peer: PeerInfo


@dataclass(frozen=True, slots=True)
class Disconnect:
    peer: PeerInfo


Effect = Send | Write | MoveBlocks | CancelWrite | Expect | Forget | Connect | Disconnect
