"""The process of the controller: the shell around `Controller` and `Nodes`."""

import logging
import time
from dataclasses import dataclass

import msgspec
import zmq

from flowkv.auth import ClusterKey
from flowkv.cluster.controller import Controller
from flowkv.cluster.nodes import Nodes, node_name
from flowkv.cluster.rebuild import Rebuild
from flowkv.cluster.usages import Usages
from flowkv.config import ClusterConfig
from flowkv.errors import ConfigError, FlowKVError, ProtocolError
from flowkv.messages import (
    ClusterStatus,
    Dismissed,
    InstanceExited,
    Introduce,
    Join,
    Leave,
    LeaveSoon,
    Message,
    NodeBeat,
    Note,
    Ready,
    Register,
    RegistrationRefused,
    RestartInstance,
    ServiceBeat,
    StartFailed,
    StopInstance,
    TurnedAway,
    Usage,
    seat_of,
)
from flowkv.usage import UsageMeter
from flowkv.wire import Mailbox, Outbox, SyncContext

_BEAT_MS = 250
_SERVICE_BEAT_S = 1.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControllerSpec:
    """All that a new process needs to become a controller."""

    name: str
    address: str
    launcher_address: str
    epoch: str
    config: ClusterConfig  # of the cluster, as joining nodes get it
    model_name: str
    key: ClusterKey | None  # None: nothing is on the network
    generation: int = 0  # controllers that this cluster had before, whose instances and frontends live
    running: tuple[str, ...] = ()  # then: the instances of this node
    running_addresses: tuple[str, ...] = ()  # their mailboxes, where these have a name: idle ones say nothing unasked


def run_controller(spec: ControllerSpec) -> int:
    """Serve until SystemExit. Returns 1, after `StartFailed`, if it cannot start."""
    context = SyncContext()
    outbox = Outbox(context, spec.key)
    try:
        mailbox = Mailbox(context, spec.address, spec.key)
    except FlowKVError as error:
        outbox.send(spec.launcher_address, StartFailed(spec.name, str(error)))
        outbox.close()
        context.term()
        return 1
    service = _Service(spec, mailbox, outbox)
    try:
        while True:
            service.turn()
    finally:
        service.close()
        mailbox.close()
        outbox.close()
        context.term()


class _Service:
    def __init__(self, spec: ControllerSpec, mailbox: Mailbox, outbox: Outbox) -> None:
        config = spec.config
        self._launcher_address = spec.launcher_address
        self._mailbox = mailbox
        self._outbox = outbox
        self._controller = Controller(
            len(config.roles), spec.epoch, config.transfer.backend,
            slo=config.slo, scheduling=config.scheduling, launcher_address=spec.launcher_address, name=spec.name,
            rebuild=Rebuild(spec.running, has_nodes=spec.key is not None) if spec.generation else None,
            restart=config.restart, drain_timeout_s=config.server.drain_timeout_s,
        )  # fmt: skip
        self._epoch = spec.epoch
        # An instance of this node, which has not registered yet: a controller before this one may have seen it.
        self._awaits_own = bool(config.roles) and not spec.generation
        self._early: list[Register] = []
        self._nodes = Nodes(spec.epoch, config, spec.model_name, spec.generation)
        self._turned_away: dict[str, tuple[int, int]] = {}
        self._name = spec.name
        self._usage = UsageMeter(spec.name)
        self._beat_due_s = 0.0
        self._usages = Usages()
        self._poller = zmq.Poller()
        self._poller.register(mailbox.socket, zmq.POLLIN)
        outbox.send(spec.launcher_address, Ready(spec.name))
        for address in spec.running_addresses:
            outbox.send(address, Introduce())

    def turn(self) -> None:
        """Messages, or a beat."""
        self._poller.poll(_BEAT_MS)
        for message in self._mailbox.receive_all():
            self._handle(message)
        if (turned_away := self._mailbox.take_turned_away(self._name)) is not None:
            self._on_turned_away(turned_away)
        if (usage := self._usage.take(time.monotonic())) is not None:
            self._usages.hear(usage, time.monotonic())
        self._controller.tick(time.monotonic())
        self._nodes.tick(time.monotonic())
        self._send_all()
        if time.monotonic() >= self._beat_due_s:
            self._beat_due_s = time.monotonic() + _SERVICE_BEAT_S
            self._outbox.send(self._launcher_address, ServiceBeat(self._name))

    def close(self) -> None:
        """Joined nodes need not wait until they miss the controller."""
        self._nodes.dismiss_all("the cluster has stopped")
        self._send_all()

    def _handle(self, message: Message) -> None:
        match message:
            case Join() | NodeBeat() | Leave():
                self._nodes.handle(message, time.monotonic())
                for exited in self._nodes.take_exits():
                    self._on_exited(exited)
            case LeaveSoon():
                for name in self._nodes.leave_soon(message.launcher):
                    self._controller.roster.retire(name)
            case Register() if self._nodes.is_awaited(message):
                pass  # it will say it again
            case Register() if node_name(message.peer.instance) is not None and self._awaits_own:
                self._early.append(message)  # what is served here says this node, not who is quickest
            case Register() if (reason := self._nodes.refusal(message)) is not None:
                self._outbox.send_last(message.peer.address, RegistrationRefused(reason))
            case Register():
                self._tell_controller(message)
                if self._nodes.is_leaving(message.peer.instance):
                    self._controller.roster.retire(message.peer.instance)
                self._admit_early()
            case TurnedAway():
                self._on_turned_away(message)
            case Usage():
                self._usages.hear(message, time.monotonic())
            case InstanceExited() if message.epoch != self._epoch:
                _logger.warning("ignored the end of %s, of an earlier cluster", message.instance)
            case InstanceExited():
                self._nodes.on_exited(message.instance)
                self._on_exited(message)
            case _:
                self._tell_controller(message)

    def _admit_early(self) -> None:
        self._awaits_own = False
        early, self._early = self._early, []
        for message in early:
            self._handle(message)

    def _on_turned_away(self, message: TurnedAway) -> None:
        """What a process has counted goes on with the one that takes its place."""
        seat = seat_of(message.process)
        connections, messages = self._turned_away.get(seat, (0, 0))
        self._turned_away[seat] = (connections + message.num_connections, messages + message.num_messages)

    def _on_exited(self, message: InstanceExited) -> None:
        if node_name(message.instance) is not None:  # that of this node is its launcher's to tell
            _logger.warning("instance %s is gone: %s", message.instance, message.reason)
        self._tell_controller(message)

    def _tell_controller(self, message: Message) -> None:
        try:
            self._controller.handle(message, time.monotonic())
        except ProtocolError as error:
            self._mailbox.ignore(error)

    def _send_all(self) -> None:
        now_s = time.monotonic()
        for to, answer in self._controller.take_messages() + self._nodes.take_messages():
            if isinstance(answer, StopInstance | RestartInstance):  # the controller knows of one launcher only
                to = self._nodes.launcher_address(answer.instance) or to
            if isinstance(answer, ClusterStatus):
                processes = self._usages.table(now_s)
                answer = msgspec.structs.replace(answer, turned_away=self._turned_away, processes=processes)
            if isinstance(answer, RestartInstance) and answer.hangs and self._nodes.is_cut_off(answer.instance, now_s):
                continue  # it would come when the instance is heard again
            is_last = isinstance(answer, Dismissed | RegistrationRefused)
            try:
                (self._outbox.send_last if is_last else self._outbox.send)(to, answer)
            except ConfigError as error:  # whoever named the address must not take the controller down
                _logger.warning("could not send a %s: %s", type(answer).__name__, error)
        for text in self._nodes.take_notes():
            self._outbox.send(self._launcher_address, Note(text))
        for gone_addresses in (self._controller.gone_addresses, self._nodes.gone_addresses):
            while gone_addresses:
                self._outbox.drop(gone_addresses.pop())
