"""What every launcher does: start the processes of this node, watch them, take all down."""

import logging
import math
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import zmq

from flowkv.auth import ClusterKey
from flowkv.config import ClusterConfig
from flowkv.engine.process import InstanceSpec
from flowkv.engine.run_folder import LAUNCHER, RUN_FOLDER_VARIABLE
from flowkv.launch.children import Children
from flowkv.launch.display import Display
from flowkv.launch.instances import Instances
from flowkv.launch.services import LOOK_S, Services
from flowkv.launch.signals import StopRequested, StopSignals
from flowkv.launch.timers import Timers
from flowkv.messages import (
    DrainCluster,
    Note,
    Progress,
    Ready,
    RestartInstance,
    ServiceBeat,
    Serving,
    StartFailed,
    StartInstance,
    StopInstance,
    Working,
)
from flowkv.types import Role
from flowkv.wire import Mailbox, Outbox, SyncContext, tcp_address

_TOY_MODULES = ["flowkv.engine.process", "flowkv.cluster.service", "flowkv.server.process"]

_logger = logging.getLogger(__name__)


class Node:
    """The processes of this node. Close `stack` when done; `running_node` does."""

    def __init__(
        self, display: Display, run_folder: Path, stack: ExitStack, key: ClusterKey | None, signals: StopSignals
    ) -> None:
        self.display = display
        self.stack = stack
        self.signals = signals
        self.key = key
        self.run_folder = run_folder
        self.context = SyncContext()
        stack.callback(self.context.term)
        self.address = self.ipc_address(LAUNCHER)
        self._mailbox = Mailbox(self.context, self.address)
        stack.callback(self._mailbox.close)
        self.outbox = Outbox(self.context, key)
        stack.callback(self.outbox.close)
        self.poller = zmq.Poller()
        self.poller.register(self._mailbox.socket, zmq.POLLIN)
        self.poller.register(signals.fd, zmq.POLLIN)
        self.children = Children(self.poller)
        self._forkserver = multiprocessing.get_context("forkserver")
        self._timers = Timers()
        self.instances = Instances(self.children, display, self.outbox, self._timers, run_folder, self._forkserver)
        self.services = Services(display, self._timers)
        self.url = ""  # of the frontend, when it is ready
        self.is_serving = False  # it has heard that the cluster is ready too

    def ipc_address(self, process: str) -> str:
        return f"ipc://{self.run_folder}/{process}"

    def mailbox_address(self, process: str, host: str | None) -> str:
        """Where a process listens: on the network if this node has a `host` there."""
        return self.ipc_address(process) if host is None else tcp_address(host, "*")

    # --- starting --------------------------------------------------------------------------------------------------

    def preload(self, config: ClusterConfig) -> Any:
        """Let instances be forked with what they need loaded; the way to start processes that need no torch."""
        self.children.logging = config.logging
        self._forkserver.set_forkserver_preload(_TOY_MODULES if config.toy else ["flowkv.engine.preload"])
        os.environ[RUN_FOLDER_VARIABLE] = str(self.run_folder)
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
        """What the instances of this node have in common; `Instances.start` fills in the rest for each."""
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

    # --- watching --------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> None:
        """Until something happens. FlowKVError if it ends this node, StopRequested if a signal does."""
        limits_s = (LOOK_S, timeout_s, self.children.next_kill_s(), self._timers.next_s(time.monotonic()))
        self.poller.poll(min(math.ceil(limit_s * 1000) for limit_s in limits_s if limit_s is not None))
        self.signals.heed()
        for message in self._mailbox.receive_all():
            self._handle(message)
        for child, how in self.children.take_gone():
            if child.name in self.instances.names:
                self.instances.on_exit(child, how)
            else:
                self.services.on_exit(child.name, child.is_ready, how)
        for name in self.services.take_hung(time.monotonic()):
            self.children.kill(name)
        self._timers.run_due(time.monotonic())

    def _handle(self, message: object) -> None:
        match message:
            case Progress():
                self.display.progress(message.process, message.fraction, message.text)
            case Note():
                self.display.note(message.text)
            case Ready():
                self._on_ready(message)
            case Serving():
                self.is_serving = True
            case ServiceBeat():
                self.services.on_beat(message.process)
            case Working():
                self.instances.on_working(message.process)
            case StartFailed() if self.services.on_start_failed(message):
                self.children.stop(message.process)
            case StartFailed():
                self.instances.on_start_failed(message)
            case StartInstance():
                self.instances.add(message.role)
            case DrainCluster():
                self.signals.ask_drain()
            case StopInstance():
                self.instances.retire(message.instance)
            case RestartInstance():
                self.instances.restart(message.instance, message.hangs)
            case _:
                _logger.warning("the launcher does not take a %s", type(message).__name__)

    def _on_ready(self, message: Ready) -> None:
        if (child := self.children.get(message.process)) is None:
            return  # it is dead by now
        child.is_ready = True
        self.url = message.url or self.url
        self.display.progress(message.process, 1.0, "ready")
        self.instances.on_ready(message.process)
        self.services.on_ready(message.process, time.monotonic())


@contextmanager
def running_node(display: Display, key: ClusterKey | None) -> Iterator[Node]:
    """A node until the block ends, by itself or by one of STOP_SIGNALS; nothing of it is left then."""
    with ExitStack() as stack:
        signals = StopSignals()
        stack.callback(signals.close)
        run_folder = Path(tempfile.mkdtemp(prefix="flowkv-"))  # 0700: nobody else can send messages
        stack.callback(shutil.rmtree, run_folder, ignore_errors=True)
        try:
            yield Node(display, run_folder, stack, key, signals)
        except StopRequested:
            display.note("stopping")
        finally:
            signals.ignore()  # where a breakdown ends this the first is still to come: it must not end the clearing up
