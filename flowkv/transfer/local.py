"""Pools in one process: the reference transport, for tests and for engines that share a process."""

import time
from collections.abc import Sequence

from flowkv.errors import TransferError
from flowkv.transfer.base import Arrived, Completions, Linked, Written
from flowkv.transfer.plan import Run
from flowkv.types import PoolDescriptor

NAME = "local"


class LocalTransfer:
    """Writes are made at once, in `submit`. `network` maps a name to the engine behind it."""

    def __init__(
        self, network: "dict[str, LocalTransfer]", name: str, buffer: memoryview, block_bytes: int, fingerprint: str
    ) -> None:
        self.descriptor = PoolDescriptor(
            node=NAME,
            layout_fingerprint=fingerprint,
            num_blocks=len(buffer) // block_bytes,
            block_bytes=block_bytes,
            endpoints={NAME: name.encode()},
        )
        self._network = network
        self._buffer = buffer
        self._block_bytes = block_bytes
        self._peers: dict[str, LocalTransfer] = {}
        self._written: list[Written] = []
        self._arrived: list[Arrived] = []
        self._linked: list[Linked] = []
        network[name] = self

    def connect(self, peer: str, pool: PoolDescriptor) -> None:
        name = pool.endpoints[NAME].decode()
        if name not in self._network:
            raise TransferError(f"no pool of {name}")
        self._peers[peer] = self._network[name]
        self._linked.append(Linked(peer, NAME))

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def submit(self, ticket: int, peer: str, runs: Sequence[Run], immediate: int) -> None:
        num_blocks = sum(run.num_blocks for run in runs)
        if (target := self._peers.get(peer)) is not None:
            for src, dst, count in runs:
                size = self._block_bytes
                target._buffer[dst * size : (dst + count) * size] = self._buffer[src * size : (src + count) * size]
            target._arrived.append(Arrived(immediate, num_blocks))
        self._written.append(Written(ticket, num_blocks * self._block_bytes, 0.0, time.monotonic()))

    def cancel(self, ticket: int) -> None:
        """What was submitted is done."""

    def expect(self, immediate: int) -> None:
        """Nothing to look out for: arrivals are there when they are made."""

    def forget(self, immediate: int) -> None:
        """The engine knows which immediates it counts."""

    @property
    def has_completions(self) -> bool:
        """Whether `poll` has something to report: there is no descriptor to wait for."""
        return bool(self._written or self._arrived or self._linked)

    def poll(self) -> Completions:
        completions = Completions(self._written, self._arrived, self._linked)
        self._written, self._arrived, self._linked = [], [], []
        return completions

    def filenos(self) -> list[int]:
        return []

    def close(self) -> None:
        self._peers.clear()
