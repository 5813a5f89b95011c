"""The process of one instance: the shell around its `Engine`."""

import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import zmq

from flowkv import __version__
from flowkv.auth import ClusterKey
from flowkv.config import ClusterConfig, parse_bytes
from flowkv.engine.batch import Runner
from flowkv.engine.effects import CancelWrite, Connect, Disconnect, Effect, Expect, Forget, MoveBlocks, Send, Write
from flowkv.engine.engine import Engine
from flowkv.engine.link_notes import LinkNotes
from flowkv.engine.repeat import run_repeats
from flowkv.engine.toy import MAX_MODEL_TOKENS, VOCAB_SIZE, ToyRunner, toy_layout
from flowkv.errors import ConfigError, FlowKVError, PoolError, ProtocolError, TransferError
from flowkv.kv.layout import KvLayout
from flowkv.kv.pool import KvPool, available_memory_bytes
from flowkv.messages import (
    FrontendExited,
    Introduce,
    Message,
    Note,
    PeerInfo,
    Progress,
    Ready,
    Register,
    Registered,
    RegistrationRefused,
    StartFailed,
    Working,
)
from flowkv.transfer.select import open_transfer
from flowkv.types import ModelInfo, Role
from flowkv.usage import UsageMeter
from flowkv.wire import Mailbox, Outbox, SyncContext

_BEAT_MS = 500  # between looks at the clock while idle, at most
_BEATS = 6  # in a lease, at least
_AUTO_POOL_CONTEXTS = 16  # an automatic pool holds so many requests of full length ...
_AUTO_POOL_FRACTION = 0.4  # ... within this share of free memory, for all instances together

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """All that a new process needs to become an instance."""

    name: str
    role: Role
    config: ClusterConfig
    model_folder: Path | None  # None: a toy
    model_name: str
    threads: int
    address: str
    pool_address: str  # of the Unix socket that hands its pool out
    controller_address: str
    launcher_address: str
    epoch: str  # of the cluster
    num_local_instances: int = 1  # on this node, which share its memory
    key: ClusterKey | None = None  # None: nothing is on the network, and no instance on another node can come
    place: socket.socket | None = None  # of a joined node (`messages.Join`): held by this process too, to its end


class _Model(Protocol):
    """What is served: its facts, and how to make a runner once there is a pool."""

    info: ModelInfo
    layout: KvLayout

    def runner(self, pool: KvPool) -> Runner: ...


class _ToyModel:
    def __init__(self, spec: InstanceSpec) -> None:
        self.layout = toy_layout(spec.config.engine.block_size)
        self.info = ModelInfo(
            name=spec.model_name, dtype="toy", vocab_size=VOCAB_SIZE, max_model_tokens=MAX_MODEL_TOKENS,
            fingerprint="toy",
        )  # fmt: skip
        self._step_s = spec.config.toy_step_s

    def runner(self, pool: KvPool) -> Runner:
        return ToyRunner(self.layout, pool.buffer, pool.num_blocks, self._step_s)


def run_instance(spec: InstanceSpec) -> int:
    """Load, register, serve until told to stop by SystemExit (`child_main` turns END_SIGNAL into that).

    Returns 1, after `StartFailed`, if it cannot start.
    """
    context = SyncContext()
    outbox = Outbox(context, spec.key)
    try:
        instance = _start(spec, context, outbox)
        if instance is None:
            return 1
        try:
            instance.run()
        finally:
            instance.close()
    finally:
        outbox.close()
        context.term()


def _start(spec: InstanceSpec, context: SyncContext, outbox: Outbox) -> "_Instance | None":
    try:
        return _Instance(spec, context, outbox)
    except FlowKVError as error:
        outbox.send(spec.launcher_address, StartFailed(spec.name, str(error)))
        return None


class _Instance:
    def __init__(self, spec: InstanceSpec, context: SyncContext, outbox: Outbox) -> None:
        self._spec = spec
        self._outbox = outbox
        model = self._load()
        layout = model.layout
        pool = self._make_pool(layout, model.info)
        self._runner = model.runner(pool)
        self._transfer = open_transfer(
            spec.name, pool, layout.fingerprint, spec.pool_address, spec.config.transfer.backend,
            spec.key is not None,
        )  # fmt: skip
        self._link_notes = LinkNotes(spec.name)
        self._has_worked = False
        self._mailbox = Mailbox(context, spec.address, spec.key)
        self._usage = UsageMeter(spec.name)
        self._engine = Engine(
            spec.name, spec.config.engine, pool.num_blocks, spec.role, spec.controller_address,
            spec.config.transfer.lease_s, spec.config.slo.max_step_s, self._mailbox.address,
        )  # fmt: skip
        self._poller = zmq.Poller()
        self._poller.register(self._mailbox.socket, zmq.POLLIN)
        self._polled: list[int] = []
        self._beat_ms = min(_BEAT_MS, int(1000 * spec.config.transfer.lease_s / _BEATS))
        peer = PeerInfo(spec.name, self._mailbox.address, self._transfer.descriptor)
        engine = spec.config.engine
        self._register = Register(
            peer, spec.role, model.info, layout.block_size, engine.max_choices, __version__, spec.epoch,
            engine.max_batch_tokens,
        )  # fmt: skip
        self._is_registered = False
        outbox.send(spec.controller_address, self._register)

    def run(self) -> NoReturn:
        """Messages, completions, a step; and again. Waits only when there is nothing to compute."""
        step_began_s = time.monotonic()
        while True:
            self._take_messages()
            now_s = time.monotonic()
            batch = self._engine.next_batch(now_s, self._spec.config.engine.max_repeats)
            self._carry_out()
            if batch is None:
                self._wait()
                step_began_s = time.monotonic()
                continue
            result = run_repeats(self._runner, batch)
            now_s = time.monotonic()
            self._engine.on_result(result, now_s - step_began_s, now_s)
            self._carry_out()
            step_began_s = now_s
            self._tell_progress()

    def _tell_progress(self) -> None:
        if not self._has_worked:
            self._has_worked = True
            self._outbox.send(self._spec.launcher_address, Working(self._spec.name))

    def close(self) -> None:
        self._transfer.close()
        self._mailbox.close()

    def _take_messages(self) -> None:
        for message in self._mailbox.receive_all():
            self._take_message(message)
        if (turned_away := self._mailbox.take_turned_away(self._spec.name)) is not None:
            self._outbox.send(self._spec.controller_address, turned_away)
        if (usage := self._usage.take(time.monotonic())) is not None:
            self._outbox.send(self._spec.controller_address, usage)
        written, arrived, linked = self._transfer.poll()
        for link in linked:
            self._link_notes.up(link)
            self._engine.on_linked(link, time.monotonic())
        for completion in written:
            self._engine.on_written(completion, time.monotonic())
        for arrival in arrived:
            self._engine.on_arrived(arrival, time.monotonic())
        self._engine.tick(time.monotonic())
        self._link_notes.tick(time.monotonic())
        for text in self._link_notes.take():
            self._outbox.send(self._spec.launcher_address, Note(text))

    def _take_message(self, message: Message) -> None:
        name, launcher = self._spec.name, self._spec.launcher_address
        match message:
            case FrontendExited():
                self._outbox.drop(message.address)
            case Registered() if not self._is_registered:
                self._is_registered = True
                self._outbox.send(launcher, Ready(name))
            case Registered():
                pass
            case Introduce():
                self._outbox.send(self._spec.controller_address, self._engine.introduction(self._register))
            case RegistrationRefused():
                self._outbox.send(launcher, StartFailed(name, message.reason))
            case _:
                try:
                    self._engine.handle(message, time.monotonic())
                except ProtocolError as error:
                    self._mailbox.ignore(error)

    def _carry_out(self) -> None:
        for effect in self._engine.take_effects():
            self._do(effect)
        if self._spec.config.engine.check_integrity:
            self._engine.check_integrity()

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Write():
                self._transfer.submit(effect.ticket, effect.peer, effect.runs, effect.immediate)
            case MoveBlocks():
                self._runner.copy_blocks(effect.copies)
            case CancelWrite():
                self._transfer.cancel(effect.ticket)
            case Expect():
                self._transfer.expect(effect.immediate)
            case Forget():
                self._transfer.forget(effect.immediate)
            case Connect():
                self._connect(effect.peer)
            case Disconnect():
                self._link_notes.gone(effect.peer.instance)
                self._transfer.disconnect(effect.peer.instance)
                self._outbox.drop(effect.peer.address)

    def _send(self, effect: Send) -> None:
        try:
            self._outbox.send(effect.address, effect.message)
        except ConfigError as error:  # whoever named the address must not take this instance down
            _logger.warning("%s could not send a %s: %s", self._spec.name, type(effect.message).__name__, error)

    def _connect(self, peer: PeerInfo) -> None:
        """A link that cannot be made leaves both instances without each other, and says so."""
        self._link_notes.begun(peer.instance, time.monotonic())
        try:
            self._transfer.connect(peer.instance, peer.pool)
        except TransferError as error:
            self._link_notes.failed(peer.instance, str(error))

    def _wait(self) -> None:
        """Until a message or a completion is there, or for a beat."""
        if (filenos := self._transfer.filenos()) != self._polled:
            for fd in self._polled:
                self._poller.unregister(fd)
            for fd in filenos:
                self._poller.register(fd, zmq.POLLIN)
            self._polled = filenos
        self._poller.poll(self._beat_ms)

    def _load(self) -> _Model:
        spec = self._spec
        if spec.model_folder is None:
            return _ToyModel(spec)
        from flowkv.engine.torch_model import TorchModel  # heavy: only where a real model is served

        return TorchModel(
            spec.model_folder, spec.model_name, spec.config, spec.threads,
            lambda fraction, text: self._outbox.send(spec.launcher_address, Progress(spec.name, fraction, text)),
        )  # fmt: skip

    def _make_pool(self, layout: KvLayout, info: ModelInfo) -> KvPool:
        config = self._spec.config
        num_bytes = parse_bytes(config.engine.kv_memory)
        if num_bytes is None:
            wanted = _AUTO_POOL_CONTEXTS * layout.num_blocks_for(info.max_model_tokens) * layout.block_bytes
            share = int(available_memory_bytes() * _AUTO_POOL_FRACTION) // self._spec.num_local_instances
            num_bytes = min(wanted, share)
        if num_bytes < layout.block_bytes:
            raise PoolError(f"engine.kv_memory is {num_bytes} bytes, less than one block of {layout.block_bytes} bytes")
        self._outbox.send(
            self._spec.launcher_address, Progress(self._spec.name, 0.95, f"{num_bytes / 2**20:.0f} MiB KV pool")
        )
        return KvPool.create(num_bytes // layout.block_bytes, layout.block_bytes)
