"""Pools in one process: the reference transport, for tests and for engines that share a process."""

import time
from collections.abc import Sequence

from flowkv.errors import TransferError
from flowkv.transfer.base import Arrived, Written
from flowkv.transfer.plan import Run


class LocalTransfer:
    """Writes are made at once, in `submit`. `network` maps a pool address to the engine behind it."""

    def __init__(self, network: "dict[str, LocalTransfer]", address: str, buffer: memoryview, block_bytes: int) -> None:
        self._network = network
        self._buffer = buffer
        self._block_bytes = block_bytes
        self._peers: dict[str, LocalTransfer] = {}
        self._written: list[Written] = []
        self._arrived: list[Arrived] = []
        network[address] = self

    def connect(self, peer: str, pool_address: str) -> None:
        if pool_address not in self._network:
            raise TransferError(f"no pool at {pool_address}")
        self._peers[peer] = self._network[pool_address]

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

    @property
    def has_completions(self) -> bool:
        """Whether `poll` has something to report: there is no descriptor to wait for."""
        return bool(self._written or self._arrived)

    def poll(self) -> tuple[list[Written], list[Arrived]]:
        written, self._written = self._written, []
        arrived, self._arrived = self._arrived, []
        return written, arrived

    def filenos(self) -> list[int]:
        return []

    def close(self) -> None:
        self._peers.clear()
