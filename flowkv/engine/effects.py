"""What an engine wants done; the shell around it (a process, the simulator, a test) does it."""

from dataclasses import dataclass

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
class Connect:
    peer: PeerInfo


@dataclass(frozen=True, slots=True)
class Disconnect:
    peer: PeerInfo


Effect = Send | Write | Connect | Disconnect
