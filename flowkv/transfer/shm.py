"""Pools of processes on one node: the writer maps the peer's pool and copies into it.

Each pair of instances has one connection (Unix, SEQPACKET), made by the writer. The pool's descriptor comes over it
first; then a small packet for every write that has been made. The end of the connection is the end of the peer.
"""

import logging
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flowkv.errors import FlowKVError, TransferError
from flowkv.kv.pool import KvPool
from flowkv.transfer.backends import SHM
from flowkv.transfer.base import Arrived, Completions, Linked, Written
from flowkv.transfer.done import Done
from flowkv.transfer.plan import Run
from flowkv.types import PoolDescriptor

_ARRIVED = struct.Struct("<QI")  # immediate, number of blocks
_POOL = struct.Struct("<QQ")  # number of blocks, bytes a block
_CONNECT_TIMEOUT_S = 3.0  # a thread answers, however busy the peer is: one that does not is stopped or dead
_RECONNECT_INTERVAL_S = 0.2
_PIECE_BYTES = 512 << 10
_TAIL_BYTES = 64

_Bytes = npt.NDArray[np.uint8]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Submission:
    ticket: int
    runs: Sequence[Run]
    immediate: int


class _Link:
    """This process's way into one peer's pool: a thread that connects, and then copies while steps run."""

    def __init__(self, peer: str, pool_address: str, source: KvPool, done: Done[Written | Linked]) -> None:
        self._peer_name = peer
        self._address = pool_address
        self._source = np.frombuffer(source.buffer, np.uint8)
        self._block_bytes = source.block_bytes
        self._done = done
        self._closed = threading.Event()
        self._peer: tuple[socket.socket, KvPool] | None = None  # once connected
        self._submissions: queue.SimpleQueue[_Submission | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()  # tickets, until they are known to be written
        self._thread = threading.Thread(target=self._run, name="flowkv-link", daemon=True)
        self._thread.start()

    def submit(self, submission: _Submission) -> None:
        self._submissions.put(submission)

    def cancel(self, ticket: int) -> None:
        self._cancelled.add(ticket)

    def forget(self, ticket: int) -> None:
        """It is written, and a cancellation came too late."""
        self._cancelled.discard(ticket)

    def close(self) -> None:
        """What is still queued completes unsent."""
        self._closed.set()
        if self._peer is not None:
            self._peer[0].shutdown(socket.SHUT_RDWR)  # frees a thread that waits for a stopped peer to read
        self._submissions.put(None)
        self._thread.join()
        if self._peer is not None:
            self._peer[0].close()
            self._peer[1].close()

    def _run(self) -> None:
        self._peer = self._connect()
        if self._peer is not None:
            self._done.put(Linked(self._peer_name, SHM))
        while (submission := self._submissions.get()) is not None:
            self._done.put(self._write(submission))

    def _write(self, submission: _Submission) -> Written:
        started_s = time.monotonic()
        is_wanted = submission.ticket not in self._cancelled
        num_blocks = self._copy(submission.runs) if is_wanted else 0
        if num_blocks:
            self._announce(submission.immediate, num_blocks)
        now_s = time.monotonic()
        return Written(submission.ticket, num_blocks * self._block_bytes, now_s - started_s, now_s)

    def _connect(self) -> tuple[socket.socket, KvPool] | None:
        """A peer that does not answer is stopped, or dead and soon known to be: until `close`, it may come back."""
        level = logging.WARNING
        while not self._closed.is_set():
            try:
                return attach(self._address, self._block_bytes)
            except FlowKVError as error:
                _logger.log(level, "%s; trying again", error)
                level = logging.DEBUG
                self._closed.wait(_RECONNECT_INTERVAL_S)
        return None

    def _copy(self, runs: Sequence[Run]) -> int:
        """Blocks copied: all, or none where the peer is gone."""
        if self._peer is None or self._closed.is_set():
            return 0
        size = self._block_bytes
        target = np.frombuffer(self._peer[1].buffer, np.uint8)
        for src, dst, count in runs:
            copy_bytes(target[dst * size : (dst + count) * size], self._source[src * size : (src + count) * size])
        return sum(run.num_blocks for run in runs)

    def _announce(self, immediate: int, num_blocks: int) -> None:
        assert self._peer is not None
        try:
            self._peer[0].sendall(_ARRIVED.pack(immediate, num_blocks))
        except (BrokenPipeError, ConnectionResetError):
            self._closed.set()  # the peer is dead: whoever watches processes says so to the engine


class ShmTransfer:
    """The shared-memory transport of one instance, listening at `address` (a path) for writers."""

    def __init__(self, pool: KvPool, address: str, layout_fingerprint: str, node: str) -> None:
        self.descriptor = PoolDescriptor(
            node=node,
            layout_fingerprint=layout_fingerprint,
            num_blocks=pool.num_blocks,
            block_bytes=pool.block_bytes,
            endpoints={SHM: os.fsencode(address)},
        )
        self._pool = pool
        self._links: dict[str, _Link] = {}
        self._link_of: dict[int, _Link] = {}  # by ticket, until it is written
        self._done: Done[Written | Linked] = Done()
        self._writers: dict[int, socket.socket] = {}  # connections that arrivals come from, by descriptor
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen(64)
        self._closed = False
        self._acceptor = threading.Thread(target=self._accept, name="flowkv-pool", daemon=True)
        self._acceptor.start()

    def connect(self, peer: str, pool: PoolDescriptor) -> None:
        self._links[peer] = _Link(peer, os.fsdecode(pool.endpoints[SHM]), self._pool, self._done)

    def disconnect(self, peer: str) -> None:
        if (link := self._links.pop(peer, None)) is not None:
            link.close()

    def submit(self, ticket: int, peer: str, runs: Sequence[Run], immediate: int) -> None:
        if (link := self._links.get(peer)) is not None:
            self._link_of[ticket] = link
            link.submit(_Submission(ticket, runs, immediate))
        else:  # disconnected since: whoever watches processes has settled what was under way
            self._done.put(Written(ticket, 0, 0.0, time.monotonic()))

    def cancel(self, ticket: int) -> None:
        if (link := self._link_of.get(ticket)) is not None:
            link.cancel(ticket)

    def expect(self, immediate: int) -> None:
        """Nothing to look out for: an arrival wakes the receiver by itself."""

    def forget(self, immediate: int) -> None:
        """The engine knows which immediates it counts."""

    def poll(self) -> Completions:
        completions = Completions([], [], [])
        for item in self._done.take():
            if isinstance(item, Linked):
                completions.linked.append(item)
            else:
                if (link := self._link_of.pop(item.ticket, None)) is not None:
                    link.forget(item.ticket)
                completions.written.append(item)
        for fd, connection in list(self._writers.items()):
            if not _receive_into(connection, completions.arrived):
                del self._writers[fd]
                connection.close()
        return completions

    def filenos(self) -> list[int]:
        return [self._done.fileno, *self._writers]

    def close(self) -> None:
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for peer in list(self._links):
            self.disconnect(peer)
        for connection in self._writers.values():
            connection.close()
        self._done.close()

    def _accept(self) -> None:
        """Hand the pool out. A thread of its own, so that two instances can connect to each other at once."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                raise
            header = _POOL.pack(self._pool.num_blocks, self._pool.block_bytes)
            try:
                socket.send_fds(connection, [header], [self._pool.fd])
            except (BrokenPipeError, ConnectionResetError):
                connection.close()  # it has died, or given up waiting, since it connected
                continue
            connection.setblocking(False)
            self._writers[connection.fileno()] = connection
            self._done.wake()


def copy_bytes(target: _Bytes, source: _Bytes) -> None:
    """Copy contiguous bytes in pieces that stay in the cache: one large memcpy writes around it, and is slower by a
    tenth or more (benchmarks/transfer, the ladder).

    Rows without their tails are not contiguous, so numpy copies row by row, all rows in one call that gives up the
    interpreter lock once; the tails are next.
    """
    num_rows = len(source) // _PIECE_BYTES
    end = num_rows * _PIECE_BYTES
    target_rows = target[:end].reshape(num_rows, _PIECE_BYTES)
    source_rows = source[:end].reshape(num_rows, _PIECE_BYTES)
    np.copyto(target_rows[:, :-_TAIL_BYTES], source_rows[:, :-_TAIL_BYTES])
    np.copyto(target_rows[:, -_TAIL_BYTES:], source_rows[:, -_TAIL_BYTES:])
    np.copyto(target[end:], source[end:])


def attach(pool_address: str, block_bytes: int) -> tuple[socket.socket, KvPool]:
    """Connect to a listening `ShmTransfer` and map the pool that it hands out. TransferError if that cannot be,
    PoolError if the pool is not what its owner says."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_CONNECT_TIMEOUT_S)
        connection.connect(pool_address)
        header, fds, _, _ = socket.recv_fds(connection, _POOL.size, 1)
        connection.settimeout(None)
        return connection, _map_peer(pool_address, header, fds, block_bytes)
    except OSError as error:
        connection.close()
        raise TransferError(f"the pool at {pool_address} cannot be reached: {error}") from error
    except FlowKVError:
        connection.close()
        raise


def _map_peer(pool_address: str, header: bytes, fds: list[int], block_bytes: int) -> KvPool:
    if len(header) != _POOL.size or len(fds) != 1:
        raise TransferError(f"the pool at {pool_address} was not handed out")
    num_blocks, peer_block_bytes = _POOL.unpack(header)
    if peer_block_bytes != block_bytes:
        os.close(fds[0])
        raise TransferError(f"a block has {peer_block_bytes} bytes at {pool_address}, {block_bytes} here")
    return KvPool.attach(fds[0], num_blocks, peer_block_bytes)


def _receive_into(connection: socket.socket, arrived: list[Arrived]) -> bool:
    """Read every packet that is there. False once the writer has gone."""
    while True:
        try:
            packet = connection.recv(_ARRIVED.size)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if len(packet) != _ARRIVED.size:
            return False
        arrived.append(Arrived(*_ARRIVED.unpack(packet)))
