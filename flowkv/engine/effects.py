"""What an engine wants done; the shell around it (a process, the simulator, a test) does it."""

import msgspec

from flowkv.kv.blocks import BlockCopy
from flowkv.messages import Message, PeerInfo
from flowkv.transfer.plan import Run


class Send(msgspec.Struct, frozen=True):
    address: str
    message: Message


class Write(msgspec.Struct, frozen=True):
    """Write runs of this instance's blocks into a peer's pool; `Engine.on_written(ticket)` when that is done."""

    ticket: int
    peer: str
    runs: list[Run]
    immediate: int


class MoveBlocks(msgspec.Struct, frozen=True):
    """Copy blocks (source, destination) of this pool now, before any later effect is carried out: no step is under
    way, and whoever reads them will look at the destinations."""

    copies: tuple[BlockCopy, ...]


class CancelWrite(msgspec.Struct, frozen=True):
    """Nobody wants this `Write` any more; `Engine.on_written(ticket)` says when it is over."""

    ticket: int


class Expect(msgspec.Struct, frozen=True):
    """Blocks will arrive under `immediate`. Comes before the message that tells the peer of it."""

    immediate: int


class Forget(msgspec.Struct, frozen=True):
    """No more blocks will arrive under `immediate`."""

    immediate: int


class Connect(msgspec.Struct, frozen=True):
    """Make a link into a peer's pool; `Engine.on_linked` when it is there."""

    peer: PeerInfo


class Disconnect(msgspec.Struct, frozen=True):
    peer: PeerInfo


Effect = Send | Write | MoveBlocks | CancelWrite | Expect | Forget | Connect | Disconnect
