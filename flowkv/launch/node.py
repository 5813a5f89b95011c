"""What every launcher does: start the processes of this node, watch them, start instances again, take all down."""

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, Protocol

import zmq

from flowkv.auth import ClusterKey
from flowkv.child import STOP_SIGNALS, once
from flowkv.config import ClusterConfig
from flowkv.engine.process import InstanceSpec, run_instance
from flowkv.errors import ConfigError, FlowKVError
from flowkv.launch.children import Child, Children
from flowkv.messages import InstanceExited, Note, Progress, Ready, StartFailed
from flowkv.types import Role
from flowkv.wire import Mailbox, Outbox, SyncContext, tcp_address

_MAX_FAILED_STARTS = 3  # of one instance in a row, before the launcher gives up on it
_TOY_MODULES = ["flowkv.engine.process", "flowkv.cluster.service", "flowkv.server.process"]

_logger = logging.getLogger(__name__)


class Display(Protocol):
    """Where a launcher shows what its processes are doing."""

    def progress(self, process: str, fraction: float, text: str) -> None: ...

    def ready(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(slots=True)
class _Seat:
    """A place for one instance after another."""

    spec: InstanceSpec
    epoch: int = 0
    num_failed_starts: int = 0


class Node:
    """The processes of this node. Close `stack` when done; `running_node` does."""

    def __init__(self, display: Display, run_folder: Path, stack: ExitStack, key: ClusterKey | None) -> None:
        self.display = display
        self.stack = stack
        self.key = key
        self.run_folder = run_folder
        self.context = SyncContext()
        stack.callback(self.context.term)
        self.address = self.ipc_address("launcher")
        self._mailbox = Mailbox(self.context, self.address)
        stack.callback(self._mailbox.close)
        self.outbox = Outbox(self.context, key)
        stack.callback(self.outbox.close)
        self.poller = zmq.Poller()
        self.poller.register(self._mailbox.socket, zmq.POLLIN)
        self.children = Children(self.poller)
        self._seats: dict[str, _Seat] = {}  # by the name of the instance in it
        self._forkserver = multiprocessing.get_context("forkserver")
        self.url = ""  # of the frontend, when it is ready

    def ipc_address(self, process: str) -> str:
        return f"ipc://{self.run_folder}/{process}"

    def mailbox_address(self, process: str, host: str | None) -> str:
        """Where a process listens: on the network if this node has a `host` there."""
        return self.ipc_address(process) if host is None else tcp_address(host, "*")

    @property
    def instances(self) -> list[str]:
        return list(self._seats)

    # --- starting --------------------------------------------------------------------------------------------------

    def preload(self, config: ClusterConfig) -> Any:
        """Let instances be forked with what they need loaded; the way to start processes that need no torch."""
        self._forkserver.set_forkserver_preload(_TOY_MODULES if config.toy else ["flowkv.engine.torch_model"])
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{self.run_folder}/inductor")  # not beside it
        return self._forkserver if config.toy else multiprocessing.get_context("spawn")

    @property
    def folders(self) -> tuple[str, str]:
        """Ours and that of multiprocessing: one process is told to remove them if the launcher is killed."""
        return str(self.run_folder), get_temp_dir()

    def instance_template(
        self,
        config: ClusterConfig,
        model_folder: Path | None,
        model_name: str,
        controller_address: str,
        epoch: str,
        place: socket.socket | None = None,
    ) -> InstanceSpec:
        """What the instances of this node have in common; `start_instances` fills in the rest for each."""
        return InstanceSpec(
            name="",
            role=Role.MIXED,
            config=config,
            model_folder=model_folder,
            model_name=model_name,
            threads=0,
            address="",
            pool_address="",
            controller_address=controller_address,
            launcher_address=self.address,
            epoch=epoch,
            key=self.key,
            place=place,
        )

    def start_instances(self, template: InstanceSpec, roles: list[Role], host: str | None, suffix: str = "") -> None:
        """One for each role, like `template`, named by role and number."""
        cores = len(os.sched_getaffinity(0))
        num_instances = max(1, len(roles))
        threads = template.config.engine.threads or max(1, (cores - 1) // num_instances)  # one is left for all others
        for index, role in enumerate(roles):
            name = f"{role}-{roles[:index].count(role)}{suffix}"
            spec = replace(
                template, name=name, role=role, threads=threads, address=self.mailbox_address(name, host),
                num_local_instances=num_instances,
            )  # fmt: skip
            self._fill(_Seat(spec))

    def _fill(self, seat: _Seat) -> None:
        """Start the seat's instance, under a name that no earlier one had."""
        spec = seat.spec
        name = f"{spec.name}~{seat.epoch}" if seat.epoch else spec.name
        address = self.ipc_address(name) if spec.address.startswith("ipc://") else spec.address
        spec = replace(spec, name=name, address=address, pool_address=f"{self.run_folder}/{name}.pool")
        self._seats[name] = seat
        self.display.progress(name, 0.0, "starting")
        self.children.start(name, self._forkserver, run_instance, spec)

    # --- watching --------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> None:
        """Until something happens. FlowKVError if it ends this node."""
        self.poller.poll(None if timeout_s is None else int(timeout_s * 1000))
        for message in self._mailbox.receive_all():
            self._handle(message)
        for child, how in self.children.take_gone():
            self._on_exit(child, how)

    def _handle(self, message: object) -> None:
        match message:
            case Progress():
                self.display.progress(message.process, message.fraction, message.text)
            case Note():
                self.display.note(message.text)
            case Ready():
                self._on_ready(message)
            case StartFailed():
                self._on_start_failed(message)
            case _:
                _logger.warning("the launcher does not take a %s", type(message).__name__)

    def _on_ready(self, message: Ready) -> None:
        if (child := self.children.get(message.process)) is None:
            return  # it is dead by now
        child.is_ready = True
        self.url = message.url or self.url
        self.display.progress(message.process, 1.0, "ready")
        if message.process in self._seats:
            self._seats[message.process].num_failed_starts = 0

    def _on_start_failed(self, message: StartFailed) -> None:
        """Fatal while the node starts; one that was to replace another is counted when its process has ended."""
        text = f"{message.process}: {message.reason}"
        seat = self._seats.get(message.process)
        if seat is None or seat.epoch == 0:
            raise ConfigError(text)
        self.display.note(text)
        if (child := self.children.get(message.process)) is not None:
            child.send_signal(signal.SIGTERM)

    def _on_exit(self, child: Child, how: str) -> None:
        """An instance is started again; without its controller or its frontend there is no cluster."""
        name = child.name
        if (seat := self._seats.pop(name, None)) is None:
            raise FlowKVError(f"the {name} {how}")
        seat.num_failed_starts += not child.is_ready
        if seat.num_failed_starts and seat.epoch == 0:
            raise FlowKVError(f"{name} {how} before it was ready")
        self.outbox.send(seat.spec.controller_address, InstanceExited(name, how, seat.spec.epoch))
        if seat.num_failed_starts >= _MAX_FAILED_STARTS:
            self.display.note(f"{name} {how}; it failed to start {seat.num_failed_starts} times and stays down")
            return
        self.display.note(f"{name} {how}; starting it again")
        seat.epoch += 1
        self._fill(seat)


@contextmanager
def running_node(display: Display, key: ClusterKey | None) -> Iterator[Node]:
    """A node until the block ends, by itself or by one of STOP_SIGNALS; nothing of it is left then."""
    with ExitStack() as stack:
        _stop_on_signals()
        run_folder = Path(tempfile.mkdtemp(prefix="flowkv-"))  # 0700: nobody else can send messages
        stack.callback(shutil.rmtree, run_folder, ignore_errors=True)
        try:
            yield Node(display, run_folder, stack, key)
        except _StopRequested:
            display.note("stopping")


class _StopRequested(Exception):
    """One of STOP_SIGNALS has come."""


def _stop_on_signals() -> None:
    def stop() -> None:
        raise _StopRequested

    handler = once(stop)
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
