"""The launcher: parent of every process of a cluster on this node.

Instances are forked from a server that has torch and transformers loaded (a toy's has neither), so that a second one
costs no second import; frontend and controller, which need no torch, do not come from such a server. Every child dies
with its parent, the KV pools die with the processes that map them, and the run folder goes with the controller.
"""

import contextlib
import logging
import multiprocessing
import os
import secrets
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, Protocol

import zmq

from flowkv import bundled
from flowkv.child import STOP_SIGNALS, child_main, once
from flowkv.cluster.service import run_controller
from flowkv.config import ClusterConfig
from flowkv.engine.process import InstanceSpec, run_instance
from flowkv.errors import ConfigError, FlowKVError, ModelError
from flowkv.messages import InstanceExited, Progress, Ready, StartFailed
from flowkv.server.process import run_frontend
from flowkv.wire import Mailbox, Outbox, SyncContext

CONTROLLER, FRONTEND = "controller", "frontend"
_STOP_TIMEOUT_S = 10.0
_EXIT_CODE_TIMEOUT_S = 1.0  # for the fork server to say how its child ended
_MAX_FAILED_STARTS = 3  # of one instance in a row, before the launcher gives up on it

_logger = logging.getLogger(__name__)


class Display(Protocol):
    """Where the launcher shows what its processes are doing."""

    def progress(self, process: str, fraction: float, text: str) -> None: ...

    def ready(self, url: str) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(slots=True)
class _Child:
    """A process of ours. `pid_fd` is what is believed: it tells of this very process, and of no other.

    (What `multiprocessing` says of a forked process comes from the fork server, and is wrong once that has died.)
    """

    process: BaseProcess
    pid_fd: int
    spec: InstanceSpec | None = None  # of an instance
    is_ready: bool = False

    def send_signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pid_fd, signum)

    def is_gone(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended, after waiting for that so long."""
        return bool(select.select([self.pid_fd], [], [], timeout_s)[0])

    def describe_exit(self) -> str:
        self.process.join(_EXIT_CODE_TIMEOUT_S)
        exitcode = self.process.exitcode
        if exitcode is None:
            return "ended"
        return f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exited with code {exitcode}"


@dataclass(slots=True)
class _Seat:
    """A place in the cluster, taken by one instance after another."""

    spec: InstanceSpec
    epoch: int = 0
    num_failed_starts: int = 0


class Launcher:
    """Starts a cluster, watches it, and takes it down. `run` returns when told to stop by SIGINT or SIGTERM."""

    def __init__(self, config: ClusterConfig, display: Display) -> None:
        self._config = config
        self._display = display
        self._model_folder = resolve_model(config)
        self._model_name = config.model_name or (self._model_folder.name if self._model_folder else "toy")
        if config.model is None and not config.toy and config.model_name is None:
            self._model_name = bundled.MODEL_NAME
        self._children: dict[str, _Child] = {}
        self._seats: dict[str, _Seat] = {}  # by the name of the instance in it
        self._url = ""
        self._epoch = secrets.token_hex(8)
        # One server to fork from: with torch for instances of a model; without, it can fork the other processes too.
        self._forkserver = multiprocessing.get_context("forkserver")
        self._forkserver.set_forkserver_preload([__name__ if config.toy else "flowkv.engine.torch_model"])
        self._light = self._forkserver if config.toy else multiprocessing.get_context("spawn")

    def run(self) -> None:
        """ConfigError, ModelError or PoolError if the cluster cannot start; it is gone by then."""
        with contextlib.ExitStack() as stack:
            _stop_on_signals()
            self._run_folder = Path(tempfile.mkdtemp(prefix="flowkv-"))  # 0700: nobody else can send messages
            stack.callback(shutil.rmtree, self._run_folder, ignore_errors=True)
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{self._run_folder}/inductor")  # not beside it
            try:
                self._open(stack)
                stack.callback(self._stop_all)
                self._start_all()
                self._watch()
            except _StopRequested:
                self._display.note("stopping")

    # --- starting --------------------------------------------------------------------------------------------------

    def _open(self, stack: contextlib.ExitStack) -> None:
        context = SyncContext()
        stack.callback(context.term)
        self._mailbox = Mailbox(context, self._address("launcher"))
        stack.callback(self._mailbox.close)
        self._outbox = Outbox(context)
        stack.callback(self._outbox.close)
        self._poller = zmq.Poller()
        self._poller.register(self._mailbox.socket, zmq.POLLIN)

    def _address(self, process: str) -> str:
        return f"ipc://{self._run_folder}/{process}"

    def _start_all(self) -> None:
        """The frontend binds its port first, so that a busy one is known before a model is loaded."""
        config = self._config
        addresses = (self._address(CONTROLLER), self._address("launcher"))
        self._start(
            CONTROLLER,
            self._light,
            run_controller,
            CONTROLLER,
            *addresses,
            len(config.roles),
            self._epoch,
            config.transfer.backend,
        )
        server = config.server
        model_folder = None if self._model_folder is None else str(self._model_folder)
        listen = (server.host, server.port, self._address(FRONTEND))
        model = (model_folder, self._model_name, server.max_body_bytes)
        self._start(FRONTEND, self._light, run_frontend, *listen, *addresses, FRONTEND, *model)
        while not self._children[FRONTEND].is_ready:
            self._wait()
        cores = len(os.sched_getaffinity(0))
        threads = config.engine.threads or max(1, (cores - 1) // len(config.roles))  # a core is left for everyone else
        counts: dict[str, int] = {}
        for role in config.roles:
            index = counts[role] = counts.get(role, -1) + 1
            self._fill(_Seat(self._instance_spec(f"{role}-{index}", role, threads)))

    def _instance_spec(self, name: str, role: Any, threads: int) -> InstanceSpec:
        return InstanceSpec(
            name=name,
            role=role,
            config=self._config,
            model_folder=self._model_folder,
            model_name=self._model_name,
            threads=threads,
            address=self._address(name),
            pool_address=f"{self._run_folder}/{name}.pool",
            controller_address=self._address(CONTROLLER),
            launcher_address=self._address("launcher"),
            epoch=self._epoch,
            is_networked=False,
        )

    def _fill(self, seat: _Seat) -> None:
        """Start the seat's instance, under a name that no earlier one had."""
        spec = seat.spec
        if seat.epoch:
            name = f"{spec.name}~{seat.epoch}"
            spec = replace(
                spec, name=name, address=self._address(name), pool_address=f"{self._run_folder}/{name}.pool"
            )  # fmt: skip
        self._seats[spec.name] = seat
        self._display.progress(spec.name, 0.0, "starting")
        self._start(spec.name, self._forkserver, run_instance, spec)
        self._children[spec.name].spec = spec

    def _start(self, name: str, context: Any, target: Callable[..., object], *args: Any) -> None:
        # The controller clears up after a launcher that was killed: our folder, and that of multiprocessing.
        folders = [str(self._run_folder), get_temp_dir()] if name == CONTROLLER else []
        process = context.Process(target=child_main, args=(folders, target, args), name=f"flowkv {name}")
        # A signal to the whole group must not find a process that does not know yet what to do with it.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            process.start()
            assert process.pid is not None
            self._children[name] = _Child(process, os.pidfd_open(process.pid))
            self._poller.register(self._children[name].pid_fd, zmq.POLLIN)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    # --- watching --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        announced = False
        while True:
            self._wait()
            if not announced and all(child.is_ready for child in self._children.values()):
                announced = True
                self._display.ready(self._url)

    def _wait(self) -> None:
        self._poller.poll()
        for message in self._mailbox.receive_all():
            self._handle(message)
        for name, child in list(self._children.items()):
            if child.is_gone():
                self._on_exit(name, child)

    def _handle(self, message: object) -> None:
        match message:
            case Progress():
                self._display.progress(message.process, message.fraction, message.text)
            case Ready() if message.process in self._children:  # or it is dead by now
                self._children[message.process].is_ready = True
                self._url = message.url or self._url
                self._display.progress(message.process, 1.0, "ready")
                if message.process in self._seats:
                    self._seats[message.process].num_failed_starts = 0
            case Ready():
                pass
            case StartFailed():
                self._on_start_failed(message)
            case _:
                _logger.warning("the launcher does not take a %s", type(message).__name__)

    def _on_start_failed(self, message: StartFailed) -> None:
        """Fatal while the cluster starts; one that was to replace another is counted when its process has ended."""
        text = f"{message.process}: {message.reason}"
        seat = self._seats.get(message.process)
        if seat is None or seat.epoch == 0:
            raise ConfigError(text)
        self._display.note(text)
        self._children[message.process].send_signal(signal.SIGTERM)

    def _on_exit(self, name: str, child: _Child) -> None:
        """An instance is started again; without its controller or its frontend there is no cluster."""
        reason = child.describe_exit()
        del self._children[name]
        self._poller.unregister(child.pid_fd)
        os.close(child.pid_fd)
        if child.spec is None:
            raise FlowKVError(f"the {name} {reason}")
        seat = self._seats.pop(name)
        if not child.is_ready:
            seat.num_failed_starts += 1
        if seat.num_failed_starts and seat.epoch == 0:
            raise FlowKVError(f"{name} {reason} before it was ready")
        self._outbox.send(self._address(CONTROLLER), InstanceExited(name, reason))
        if seat.num_failed_starts >= _MAX_FAILED_STARTS:
            self._display.note(f"{name} {reason}; it failed to start {seat.num_failed_starts} times and stays down")
            return
        self._display.note(f"{name} {reason}; starting it again")
        seat.epoch += 1
        self._fill(seat)

    # --- stopping --------------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        """Frontend first, so that clients hear of it while the rest still runs; then everyone; then by force."""
        if (frontend := self._children.get(FRONTEND)) is not None:
            frontend.send_signal(signal.SIGTERM)
            frontend.is_gone(_STOP_TIMEOUT_S)
        for child in self._children.values():
            child.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        for child in self._children.values():
            if not child.is_gone(max(0.0, deadline_s - time.monotonic())):
                child.send_signal(signal.SIGKILL)
                child.is_gone(_STOP_TIMEOUT_S)
            os.close(child.pid_fd)
        # Both would end by themselves a while after this process; nobody should find them still there.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def resolve_model(config: ClusterConfig) -> Path | None:
    """The folder to serve; None for a toy. ModelError if there is none."""
    if config.toy:
        return None
    if config.model is None:
        return bundled.MODEL_FOLDER
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {config.model}: give the path of a downloaded Hugging Face model "
            "(a folder with config.json, tokenizer.json and *.safetensors)"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    return folder.resolve()


class _StopRequested(Exception):
    """One of STOP_SIGNALS has come."""


def _stop_on_signals() -> None:
    def stop() -> None:
        raise _StopRequested

    handler = once(stop)
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
