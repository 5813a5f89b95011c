"""A `TransferEngine` as both sides drive it: like an instance, asleep on its descriptors until there is something."""

import select
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import msgspec

from benchmarks import BenchmarkError
from benchmarks.transfer.sides import Channel
from flowkv.kv.pool import KvPool
from flowkv.transfer.base import Completions, TransferEngine
from flowkv.transfer.plan import Run
from flowkv.transfer.select import node_identity
from flowkv.types import PoolDescriptor

_TIMEOUT_S = 60.0
_LOOK_S = 0.05


def open_nixl(name: str, pool: KvPool, fingerprint: str) -> TransferEngine:
    """ConfigError where NIXL is not installed."""
    from flowkv.transfer.nixl import NixlTransfer  # an extra

    return NixlTransfer(name, pool, fingerprint, node_identity())


def open_shm(folder: Path, name: str, pool: KvPool, fingerprint: str) -> TransferEngine:
    from flowkv.transfer.shm import ShmTransfer

    return ShmTransfer(pool, str(folder / name), fingerprint, node_identity())


class EngineSide:
    """One side's engine. `connect` links both ways, as instances do; then the source sends what the target awaits."""

    def __init__(self, engine: TransferEngine) -> None:
        self.engine = engine
        self._tickets = count(1)

    def connect(self, channel: Channel) -> PoolDescriptor:
        """The peer's descriptor, once both links are up."""
        peer = msgspec.convert(channel.exchange(self.engine.descriptor), PoolDescriptor)
        self.engine.connect("peer", peer)
        self._wait(lambda done: bool(done.linked))
        channel.send("linked")
        self._wait(lambda done: channel.is_readable)  # the peer may need this side to move for its link
        channel.receive()
        return peer

    def send(self, runs: Sequence[Run], immediate: int) -> float:
        """Submit, and wait until written. The moment of the submission."""
        ticket = next(self._tickets)
        started_s = time.monotonic()
        self.engine.submit(ticket, "peer", runs, immediate)
        self._wait(lambda done: any(written.ticket == ticket for written in done.written))
        return started_s

    def await_arrival(self, immediate: int, num_blocks: int) -> float:
        """The moment at which this side has counted `num_blocks` blocks."""
        missing = num_blocks

        def is_complete(done: Completions) -> bool:
            nonlocal missing
            missing -= sum(arrived.num_blocks for arrived in done.arrived if arrived.immediate == immediate)
            return missing <= 0

        self._wait(is_complete)
        arrived_s = time.monotonic()
        self.engine.forget(immediate)
        return arrived_s

    def close(self) -> None:
        self.engine.close()

    def _wait(self, is_done: Callable[[Completions], bool]) -> None:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not is_done(self.engine.poll()):
            if time.monotonic() > deadline_s:
                raise BenchmarkError(f"{type(self.engine).__name__} did not complete in {_TIMEOUT_S:g} s")
            select.select(self.engine.filenos(), [], [], _LOOK_S)
