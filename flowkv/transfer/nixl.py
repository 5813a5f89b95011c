"""Pools of instances on several nodes: written to by NIXL over UCX (TCP, RDMA, or process to process in one node).

NIXL drives an agent from a thread that spins on a core, or from whoever calls it. Neither is what we want of all:

- one agent receives. Its NIXL thread sleeps until bytes come in, over TCP lands them, and answers peers that connect.
  We ask it for notifications every 100 microseconds while blocks are expected, and not at all otherwise;
- the others, the rails (`nixl_rail`), write, each from a thread of ours that sleeps while there is nothing to write.
  A post is a whole copy within a node, and may take long over TCP: rails share a submission.

A pool is registered once with each agent, and a peer's descriptor list is prepared once for each link: a submission
is one post on every rail. Each is followed by a notification, which is the arrival.
"""

import contextlib
import queue
import threading
from collections.abc import Sequence

import msgspec
import numpy as np

from flowkv.errors import TransferError
from flowkv.kv.pool import KvPool
from flowkv.transfer.backends import NIXL
from flowkv.transfer.base import Arrived, Completions, Linked, Written
from flowkv.transfer.done import Done
from flowkv.transfer.nixl_agent import Blocks, Endpoint, Nixl, ReceivingAgent, WritingAgent
from flowkv.transfer.nixl_rail import ARRIVED, POLL_INTERVAL_S, Ended, Event, Link, Part, Rail, Submission, Up
from flowkv.transfer.plan import Run
from flowkv.types import PoolDescriptor

_MIN_PART_BYTES = 8 << 20  # what is smaller is quicker on one rail than on two


class _Receiver:
    """A thread that looks for the arrivals that are expected."""

    def __init__(self, agent: ReceivingAgent, done: Done[Event]) -> None:
        self._agent = agent
        self._done = done
        self._expected: set[int] = set()  # immediates
        self._is_closed = False
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="flowkv-nixl-receive", daemon=True)
        self._thread.start()

    def expect(self, immediate: int) -> None:
        self._expected.add(immediate)
        self._woken.put(None)

    def forget(self, immediate: int) -> None:
        self._expected.discard(immediate)

    def close(self) -> None:
        self._is_closed = True
        self._woken.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            with contextlib.suppress(queue.Empty):
                self._woken.get(timeout=POLL_INTERVAL_S if self._expected else None)
            for notification in self._agent.notifications():
                self._tell(notification)
        self._agent.close()

    def _tell(self, notification: bytes) -> None:
        """What is no arrival is a greeting."""
        if len(notification) == ARRIVED.size:
            arrived = Arrived(*ARRIVED.unpack(notification))
            if arrived.immediate in self._expected:
                self._done.put(arrived)


class NixlTransfer:
    """The NIXL transport of the instance `name`.

    `num_rails` agents write at once, each on a thread: one alone does not fill a link on which bytes are copied by a
    core. ConfigError if NIXL is not installed, or has no transport here.
    """

    def __init__(self, name: str, pool: KvPool, layout_fingerprint: str, node: str, num_rails: int = 2) -> None:
        nixl = Nixl()
        receiving = ReceivingAgent(nixl, name, pool)
        writing = [WritingAgent(nixl, name, pool) for _ in range(num_rails)]
        self._done: Done[Event] = Done()
        self._pool = pool  # mapped for as long as peers write into it
        self._block_bytes = pool.block_bytes
        self._receiver = _Receiver(receiving, self._done)
        self._rails = [Rail(agent, self._done) for agent in writing]
        self._links: dict[str, Link] = {}
        self._parts_of: dict[int, list[Part]] = {}  # by ticket, until it is reported
        self.descriptor = PoolDescriptor(
            node=node,
            layout_fingerprint=layout_fingerprint,
            num_blocks=pool.num_blocks,
            block_bytes=pool.block_bytes,
            endpoints={NIXL: msgspec.msgpack.encode(receiving.endpoint)},
        )

    def connect(self, peer: str, pool: PoolDescriptor) -> None:
        """TransferError if the endpoint is not of this kind, or the blocks are of another size."""
        try:
            endpoint = msgspec.msgpack.decode(pool.endpoints[NIXL], type=Endpoint)
        except (KeyError, msgspec.DecodeError) as error:
            raise TransferError(f"the pool of {peer} has no NIXL endpoint that can be read: {error}") from error
        if pool.block_bytes != self._block_bytes:
            raise TransferError(f"{peer} has blocks of {pool.block_bytes} bytes, not of {self._block_bytes}")
        self.disconnect(peer)
        self._links[peer] = link = Link(peer, endpoint, pool.num_blocks)
        for rail in self._rails:
            rail.connect(link)

    def disconnect(self, peer: str) -> None:
        if (link := self._links.pop(peer, None)) is not None:
            for rail in self._rails:
                rail.disconnect(link)

    def submit(self, ticket: int, peer: str, runs: Sequence[Run], immediate: int) -> None:
        link = self._links.get(peer)
        src_blocks, dst_blocks = _block_indices(runs)
        rails = self._rails_for(ticket, len(src_blocks))
        submission = Submission(ticket, len(rails))
        pieces = zip(np.array_split(src_blocks, len(rails)), np.array_split(dst_blocks, len(rails)), strict=True)
        parts = self._parts_of[ticket] = [Part(submission, src, dst, immediate) for src, dst in pieces]
        for rail, part in zip(rails, parts, strict=True):
            if link is not None:
                rail.submit(link, part)
            elif part.claim():
                self._done.put(Ended(part))

    def cancel(self, ticket: int) -> None:
        for part in self._parts_of.get(ticket, []):
            if part.claim():
                self._done.put(Ended(part))

    def expect(self, immediate: int) -> None:
        self._receiver.expect(immediate)

    def forget(self, immediate: int) -> None:
        self._receiver.forget(immediate)

    def poll(self) -> Completions:
        completions = Completions([], [], [])
        for event in self._done.take():
            match event:
                case Arrived():
                    completions.arrived.append(event)
                case Up():
                    self._count_up(event.link, completions.linked)
                case Ended():
                    self._count_ended(event, completions.written)
        return completions

    def filenos(self) -> list[int]:
        return [self._done.fileno]

    def close(self) -> None:
        for rail in self._rails:
            rail.close()
        self._receiver.close()
        self._done.close()

    def _rails_for(self, ticket: int, num_blocks: int) -> list[Rail]:
        """At least one, and none without a block."""
        num_parts = max(1, min(len(self._rails), num_blocks, num_blocks * self._block_bytes // _MIN_PART_BYTES))
        first = ticket % len(self._rails)  # so that small ones are shared out
        return (self._rails[first:] + self._rails[:first])[:num_parts]

    def _count_up(self, link: Link, linked: list[Linked]) -> None:
        link.num_rails_up += 1
        if link.num_rails_up == len(self._rails) and self._links.get(link.peer) is link:
            linked.append(Linked(link.peer, NIXL))

    def _count_ended(self, ended: Ended, written: list[Written]) -> None:
        submission = ended.part.submission
        submission.num_parts_left -= 1
        submission.num_bytes += ended.num_bytes
        submission.seconds = max(submission.seconds, ended.seconds)
        if ended.error is not None:
            submission.error = ended.error
            self.cancel(submission.ticket)  # what other rails have not begun is of no use
        if not submission.num_parts_left:
            del self._parts_of[submission.ticket]
            num_bytes = 0 if submission.error else submission.num_bytes
            written.append(
                Written(submission.ticket, num_bytes, submission.seconds, ended.finished_s, submission.error)
            )


def _block_indices(runs: Sequence[Run]) -> tuple[Blocks, Blocks]:
    """Source and destination of every block, in order."""
    table = np.array(runs, np.int32).reshape(-1, 3)
    counts = table[:, 2]
    within = np.arange(counts.sum(), dtype=np.int32) - np.repeat(np.cumsum(counts, dtype=np.int32) - counts, counts)
    return np.repeat(table[:, 0], counts) + within, np.repeat(table[:, 1], counts) + within
