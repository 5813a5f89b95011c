"""NIXL driven directly, as vLLM drives it: descriptor lists prepared once, a request made of indices, one post.

With the progress thread off the initiator polls its request and the target its notifications, both without a pause:
NIXL at its best. With it on (the default, which vLLM ships) a thread of each agent does that, and the target looks.
"""

import importlib
import importlib.util
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import BenchmarkError
from benchmarks.transfer.pools import address_of
from benchmarks.transfer.sides import Channel
from flowkv.kv.pool import KvPool

Descriptors = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int32]

_TIMEOUT_S = 60.0
_LOOK_S = 1e-4  # between looks where a progress thread does the work


def is_installed() -> bool:
    return importlib.util.find_spec("nixl") is not None


@dataclass(frozen=True, slots=True)
class Request:
    """A transfer by prepared lists: `local[i]` and `remote[i]` index what `NixlAgent.prepare` was given."""

    operation: str  # "READ" or "WRITE"
    lists: tuple[Any, Any]
    local: Indices
    remote: Indices


class NixlAgent:
    """One agent with one registered pool."""

    def __init__(self, name: str, pool: KvPool, *, has_progress_thread: bool, num_threads: int) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        api = importlib.import_module("nixl._api")  # an extra, with no types
        config = api.nixl_agent_config(
            enable_prog_thread=has_progress_thread, num_threads=num_threads, backends=["UCX"]
        )
        self._agent = api.nixl_agent(name, config)
        self._has_progress_thread = has_progress_thread
        self._address = address_of(pool.buffer)
        self._registered = self._agent.register_memory([(self._address, len(pool.buffer), 0, "pool")], "DRAM")
        self._peer = ""
        self._peer_address = 0

    def connect(self, channel: Channel, is_initiator: bool) -> None:
        metadata, self._peer_address = channel.exchange([self._agent.get_agent_metadata(), self._address])
        self._peer = self._agent.add_remote_agent(metadata)
        channel.exchange("known")
        if is_initiator:
            self._agent.make_connection(self._peer)
            self._agent.send_notif(self._peer, b"hello")
            self.await_notification(b"hello")
        else:
            self.await_notification(b"hello")
            self._agent.send_notif(self._peer, b"hello")
        channel.send("connected")
        self.serve_until(channel)

    def prepare(self, local: Descriptors, remote: Descriptors) -> tuple[Any, Any]:
        """Lists of (offset, bytes) in this side's pool and the peer's, checked and registered once."""
        return (
            self._agent.prep_xfer_dlist("", _rows(local, self._address), "DRAM"),
            self._agent.prep_xfer_dlist(self._peer, _rows(remote, self._peer_address), "DRAM"),
        )

    def run(self, request: Request, tag: bytes) -> tuple[float, float]:
        """Make, post and finish a transfer that ends with notification `tag`: the moments of its start and end."""
        agent = self._agent
        started_s = time.monotonic()
        mine, theirs = request.lists
        handle = agent.make_prepped_xfer(request.operation, mine, request.local, theirs, request.remote, tag)
        state = agent.transfer(handle)
        while state == "PROC":
            if self._has_progress_thread:
                time.sleep(_LOOK_S)
            state = agent.check_xfer_state(handle)
        ended_s = time.monotonic()
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise BenchmarkError(f"NIXL ended a {request.operation} in state {state}")
        return started_s, ended_s

    def await_notification(self, tag: bytes) -> float:
        """The moment at which the peer's `tag` was seen."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not self._saw(tag):
            if time.monotonic() > deadline_s:
                raise BenchmarkError(f"NIXL brought no notification in {_TIMEOUT_S:g} s")
            if self._has_progress_thread:
                time.sleep(_LOOK_S)
        return time.monotonic()

    def serve_until(self, channel: Channel) -> Any:
        """What the other side says next; until then this agent moves whatever the other one needs."""
        while not channel.is_readable:
            self._agent.update_notifs()
        return channel.receive()

    def close(self) -> None:
        """Only once the other side needs nothing of this agent any more, and no `Request` is kept."""
        self._agent.remove_remote_agent(self._peer)
        self._agent.deregister_memory(self._registered)
        del self._agent

    def _saw(self, tag: bytes) -> bool:
        return any(tag in tags for tags in self._agent.get_new_notifs().values())


def _rows(descriptors: Descriptors, address: int) -> npt.NDArray[np.uint64]:
    """(address, bytes, device) of each."""
    rows = np.zeros((len(descriptors), 3), np.uint64)
    rows[:, 0] = descriptors[:, 0] + address
    rows[:, 1] = descriptors[:, 1]
    return rows
