"""The seam through which bytes of KV move: one-sided writes of whole runs, completed by counting."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from flowkv.transfer.plan import Run


class Written(NamedTuple):
    """A submission of this side is done: its source blocks are no longer read."""

    ticket: int
    num_bytes: int
    seconds: float  # spent moving
    finished_s: (
        float  # when it was done, which is earlier than when `poll` reports it; on the clock of `time.monotonic`
    )


class Arrived(NamedTuple):
    """`num_blocks` blocks were written into this side's pool under `immediate`.

    Completion is a count: the receiver adds these up until it has as many as it expects; in what order they come, or
    over how many links, does not matter (TransferEngine's ImmCounter).
    """

    immediate: int
    num_blocks: int


class TransferEngine(Protocol):
    """Nothing above this knows how bytes move."""

    def connect(self, peer: str, pool_address: str) -> None:
        """Begin to reach a peer's pool, before the first request needs it; what is submitted meanwhile waits."""

    def disconnect(self, peer: str) -> None:
        """Forget a dead peer; what is still queued for it is completed without being sent."""

    def submit(self, ticket: int, peer: str, runs: Sequence[Run], immediate: int) -> None:
        """Start writing; `poll` reports `Written(ticket)` when it is done, the peer's `poll` reports `Arrived`."""

    def poll(self) -> tuple[list[Written], list[Arrived]]:
        """What has completed since the last call; never waits."""

    def filenos(self) -> list[int]:
        """Descriptors that become readable when `poll` has something to report; they change after any call."""

    def close(self) -> None: ...
