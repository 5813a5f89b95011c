"""NIXL as this project uses it: agents over UCX that know one pool. Each is used from one thread."""

import contextlib
import importlib
import logging
import os
import secrets
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from flowkv.errors import ConfigError
from flowkv.kv.pool import KvPool

_BUILDS = ("nixl_cu13", "nixl_cu12")
_GREETING = b"hello"  # the notification that opens the way for those that matter
_GREETING_BYTES = 64  # read along with it
_MEMORY = "DRAM"
_PROGRESS_DELAY_US = 10_000  # bytes that come in wake NIXL's thread; it looks by itself so often, should one not

Blocks = npt.NDArray[np.int32]  # block ids, [num_blocks]

_logger = logging.getLogger(__name__)


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """How a receiving agent and its pool are reached: what peers read of `PoolDescriptor.endpoints`."""

    agent_metadata: bytes
    address: Annotated[int, msgspec.Meta(ge=0)]  # of block 0, in the memory of the pool's process
    device: Annotated[int, msgspec.Meta(ge=0)]


class Nixl:
    """The package, loaded when it is first needed. ConfigError if it is not installed."""

    def __init__(self) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what fails is raised, and logged by those who catch it
        os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
        os.environ.setdefault("UCX_DEBUG_SIGNO", "0")  # none; SIGHUP would make it log all that it does from then on
        try:
            package = _package()
            self._api = importlib.import_module(f"{package}._api")
            self._bindings = importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            raise ConfigError(f"NIXL cannot be used ({error}): pip install 'flowkv[nixl]'") from error
        names = [name for name in vars(self._bindings) if name.startswith("nixl") and name.endswith("Error")]
        self.errors: tuple[type[Exception], ...] = tuple(getattr(self._bindings, name) for name in names)

    def open_writing(self, name: str) -> Any:
        """An agent that moves only in our calls. ConfigError if UCX has no transport here."""
        try:
            return self._api.nixl_agent(name, self._api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        except self.errors as error:
            raise _no_transport(error) from error

    def open_receiving(self, name: str) -> Any:
        """An agent with a progress thread, which sleeps until something comes in.

        From the bindings: the class above them sets a delay of 0, with which that thread spins on a core.
        """
        config = self._bindings.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _PROGRESS_DELAY_US
        config.syncMode = self._bindings.NIXL_THREAD_SYNC_NONE
        agent = self._bindings.nixlAgent(name, config)
        try:
            agent.createBackend("UCX", {})
        except self.errors as error:
            raise _no_transport(error) from error
        return agent

    def region(self, address: int, num_bytes: int, device: int) -> Any:
        return self._bindings.nixlRegDList(self._bindings.DRAM_SEG, [(address, num_bytes, device, "")])


def _package() -> str:
    """`nixl` picks its build for torch's CUDA. Where torch has none it imports all of torch to learn that, two seconds,
    and then any build will do."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        if "torch" not in sys.modules and metadata.version("torch").endswith("+cpu"):
            return next(filter(find_spec, _BUILDS), "nixl")
    return "nixl"


def _no_transport(error: Exception) -> ConfigError:
    return ConfigError(f"NIXL finds no transport that works here: {error} (is UCX_TLS set?)")


def _agent_name(instance: str) -> str:
    """A restarted instance is another agent."""
    return f"{instance}-{secrets.token_hex(8)}"


def _address(memory: memoryview | npt.NDArray[np.uint8]) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


class ReceivingAgent:
    """Lets peers write into a pool. Bytes land, and peers are answered, whether or not this process has time."""

    def __init__(self, nixl: Nixl, instance: str, pool: KvPool) -> None:
        self._nixl = nixl.open_receiving(_agent_name(instance))
        self._pool = nixl.region(_address(pool.buffer), len(pool.buffer), 0)
        self._nixl.registerMem(self._pool, [])
        self.endpoint = Endpoint(self._nixl.getLocalMD(), _address(pool.buffer), 0)

    def notifications(self) -> list[bytes]:
        """Those that came since the last call."""
        return [message for messages in self._nixl.getNotifs({}, []).values() for message in messages]

    def close(self) -> None:
        self._nixl.deregisterMem(self._pool, [])
        del self._nixl


class WritingAgent:
    """Writes a pool's blocks into those of peers, over a `Connection` to each."""

    def __init__(self, nixl: Nixl, instance: str, pool: KvPool) -> None:
        self.errors = nixl.errors
        self.block_bytes = pool.block_bytes
        self._nixl = nixl.open_writing(_agent_name(instance))
        self._scratch = np.zeros(_GREETING_BYTES, np.uint8)
        self._regions = [nixl.region(_address(memory), len(memory), 0) for memory in (pool.buffer, self._scratch)]
        for region in self._regions:
            self._nixl.register_memory(region)
        self._blocks = self._prepare("", _address(pool.buffer), 0, pool.num_blocks)

    def close(self) -> None:
        """Every connection must be gone."""
        self._blocks.release()
        for region in self._regions:
            self._nixl.deregister_memory(region)
        del self._nixl

    def _prepare(self, agent: str, address: int, device: int, num_blocks: int) -> Any:
        """One descriptor for each block; of adjacent ones NIXL makes one again when they are written."""
        rows = np.zeros((num_blocks, 3), np.uint64)
        rows[:, 0] = address + np.arange(num_blocks, dtype=np.uint64) * self.block_bytes
        rows[:, 1] = self.block_bytes
        rows[:, 2] = device
        return self._nixl.prep_xfer_dlist(agent, rows, _MEMORY)


class Connection:
    """From an agent to a peer's pool. One of `errors` from any call means that the peer cannot be reached."""

    def __init__(self, agent: WritingAgent, endpoint: Endpoint, num_blocks: int) -> None:
        self._agent = agent
        self._nixl = agent._nixl
        self._endpoint = endpoint
        self._peer = self._nixl.add_remote_agent(endpoint.agent_metadata)
        self._handles: list[Any] = []  # of what is under way
        self._blocks: Any = None
        try:
            self._blocks = agent._prepare(self._peer, endpoint.address, endpoint.device, num_blocks)
        except agent.errors:
            self.close()
            raise

    def greet(self) -> Any:
        """Begin to read a few bytes of the peer's pool: when that is done, whatever a write needs has been set up."""
        mine = self._nixl.get_xfer_descs([(_address(self._agent._scratch), _GREETING_BYTES, 0)], _MEMORY)
        theirs = self._nixl.get_xfer_descs([(self._endpoint.address, _GREETING_BYTES, self._endpoint.device)], _MEMORY)
        return self._post(self._nixl.initialize_xfer("READ", mine, theirs, self._peer, _GREETING))

    def write(self, src_blocks: Blocks, dst_blocks: Blocks, notification: bytes) -> Any:
        """Begin to write blocks, and then to notify. Between processes of a node this is the whole of the copy."""
        mine, theirs = self._agent._blocks, self._blocks
        return self._post(self._nixl.make_prepped_xfer("WRITE", mine, src_blocks, theirs, dst_blocks, notification))

    def is_done(self, handle: Any) -> bool:
        """Whether what was begun is over, after which `handle` is gone."""
        if self._nixl.check_xfer_state(handle) != "DONE":
            return False
        self._handles.remove(handle)
        handle.release()
        return True

    def close(self) -> None:
        """Take it down with what is under way, in the order that NIXL asks for: transfers, lists, the peer."""
        for handle in [*self._handles, self._blocks]:
            if handle is not None:
                self._insist(handle.release)
        self._insist(partial(self._nixl.remove_remote_agent, self._peer))

    def _post(self, handle: Any) -> Any:
        self._handles.append(handle)
        self._nixl.transfer(handle)
        return handle

    def _insist(self, take_down: Callable[[], None]) -> None:
        try:
            take_down()
        except self._agent.errors as error:
            _logger.debug("NIXL keeps a part of the lost connection to %s: %r", self._peer, error)
