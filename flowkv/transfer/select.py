"""All backends that an instance has opened, as one `TransferEngine`."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from flowkv.kv.pool import KvPool
from flowkv.transfer.backends import NIXL, SHM, choose_backend
from flowkv.transfer.base import Completions, TransferEngine
from flowkv.transfer.plan import Run
from flowkv.transfer.shm import ShmTransfer
from flowkv.types import PoolDescriptor


def node_identity() -> str:
    """Equal for two processes exactly when either can reach the other's Unix sockets, and so map its pool: the same
    boot of a machine, the same view of its files and its network, the same user."""
    return digest(boot_and_namespaces("mnt", "net"), str(os.getuid()))


def boot_and_namespaces(*kinds: str) -> str:
    """This boot of this machine, and the namespaces of those kinds that this process is in."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return " ".join([boot, *(str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in kinds)])


def digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def open_transfer(
    name: str, pool: KvPool, layout_fingerprint: str, socket_path: str, forced: str, is_networked: bool
) -> "SelectingTransfer":
    """Open the backends that this instance may need: NIXL only where other nodes may come, or where it is forced.

    ConfigError where NIXL is needed and not installed.
    """
    node = node_identity()
    backends: dict[str, TransferEngine] = {}
    if forced != NIXL:
        backends[SHM] = ShmTransfer(pool, socket_path, layout_fingerprint, node)
    if forced == NIXL or (forced == "auto" and is_networked):
        from flowkv.transfer.nixl import NixlTransfer  # an extra, and half a second to start

        backends[NIXL] = NixlTransfer(name, pool, layout_fingerprint, node)
    return SelectingTransfer(backends, forced)


class SelectingTransfer:
    """`backends` as one: each peer's link goes through the one that `choose_backend` names."""

    def __init__(self, backends: Mapping[str, TransferEngine], forced: str) -> None:
        self._backends = backends
        self._forced = forced
        self._of_peer: dict[str, TransferEngine] = {}
        self._of_ticket: dict[int, TransferEngine] = {}  # until written
        first = next(iter(backends.values())).descriptor
        endpoints = {name: backend.descriptor.endpoints[name] for name, backend in backends.items()}
        self.descriptor = msgspec.structs.replace(first, endpoints=endpoints)

    def connect(self, peer: str, pool: PoolDescriptor) -> None:
        self._of_peer[peer] = self._backends[choose_backend(self.descriptor, pool, self._forced)]
        self._of_peer[peer].connect(peer, pool)

    def disconnect(self, peer: str) -> None:
        if (backend := self._of_peer.get(peer)) is not None:
            backend.disconnect(peer)

    def submit(self, ticket: int, peer: str, runs: Sequence[Run], immediate: int) -> None:
        """A peer that was disconnected keeps its backend, which completes what still comes for it."""
        self._of_ticket[ticket] = self._of_peer[peer]
        self._of_ticket[ticket].submit(ticket, peer, runs, immediate)

    def cancel(self, ticket: int) -> None:
        if (backend := self._of_ticket.get(ticket)) is not None:
            backend.cancel(ticket)

    def expect(self, immediate: int) -> None:
        for backend in self._backends.values():
            backend.expect(immediate)

    def forget(self, immediate: int) -> None:
        for backend in self._backends.values():
            backend.forget(immediate)

    def poll(self) -> Completions:
        all_completions = Completions([], [], [])
        for backend in self._backends.values():
            written, arrived, linked = backend.poll()
            all_completions.written.extend(written)
            all_completions.arrived.extend(arrived)
            all_completions.linked.extend(linked)
        for completion in all_completions.written:
            self._of_ticket.pop(completion.ticket, None)
        return all_completions

    def filenos(self) -> list[int]:
        return [fd for backend in self._backends.values() for fd in backend.filenos()]

    def close(self) -> None:
        for backend in self._backends.values():
            backend.close()
