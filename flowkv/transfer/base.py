"""The seam through which bytes of KV move: one-sided writes of whole runs, completed by counting.

A pool (`kv.pool.KvPool`) is its owner's. A peer gets its `types.PoolDescriptor`, and with that a link into it.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from flowkv.transfer.plan import Run
from flowkv.types import PoolDescriptor


class Written(NamedTuple):
    """A submission of this side is done: its source blocks are no longer read, and no more of it will be written.

    `num_bytes` is 0 where it was cancelled in time, the peer is gone, or `error` says why it could not be made.
    """

    ticket: int
    num_bytes: int
    seconds: float  # spent moving
    finished_s: (
        float  # when it was done, which is earlier than when `poll` reports it; on the clock of `time.monotonic`
    )
    error: str | None = None


class Arrived(NamedTuple):
    """`num_blocks` blocks were written into this side's pool under `immediate`.

    Completion is a count: the receiver adds these up until it has as many as it expects; in what order they come, or
    over how many links, does not matter (TransferEngine's ImmCounter).
    """

    immediate: int
    num_blocks: int


class Linked(NamedTuple):
    """A peer's pool can be written to, by this backend."""

    peer: str
    backend: str


class Completions(NamedTuple):
    """All that has happened since the last `poll`."""

    written: list[Written]
    arrived: list[Arrived]
    linked: list[Linked]


class TransferEngine(Protocol):
    """One registered pool and its links. Nothing above this knows how bytes move."""

    @property
    def descriptor(self) -> PoolDescriptor:
        """What peers need to write into this side's pool."""

    def connect(self, peer: str, pool: PoolDescriptor) -> None:
        """Begin to reach a peer's pool, before the first request needs it; what is submitted meanwhile waits.

        `poll` reports `Linked` when it is reached. TransferError at once where it can never be.
        """

    def disconnect(self, peer: str) -> None:
        """Forget a dead peer; what is still queued for it is completed without being sent."""

    def submit(self, ticket: int, peer: str, runs: Sequence[Run], immediate: int) -> None:
        """Start writing; `poll` reports `Written(ticket)` when it is done, the peer's `poll` reports `Arrived`."""

    def cancel(self, ticket: int) -> None:
        """Nobody wants this submission any more. `Written(ticket)` is the acknowledgement: at once where it has not
        begun, else when it has drained."""

    def expect(self, immediate: int) -> None:
        """Blocks will arrive under `immediate`: said before the peer is told of it."""

    def forget(self, immediate: int) -> None:
        """No more blocks will arrive under `immediate`, or nobody will count them."""

    def poll(self) -> Completions:
        """What has happened since the last call; never waits."""

    def filenos(self) -> list[int]:
        """Descriptors that become readable when `poll` has something to report; they change after any call."""

    def close(self) -> None: ...
