"""The cluster as a state machine: places requests, keeps the picture of every instance, tells everyone who is there."""

from flowkv.cluster.admission import mismatch
from flowkv.cluster.fleet import Fleet
from flowkv.cluster.liveness import STALL_S
from flowkv.cluster.load import InstanceView
from flowkv.cluster.newcomers import Newcomers
from flowkv.cluster.overload import Overload
from flowkv.cluster.rebuild import Rebuild
from flowkv.cluster.requests import Requests
from flowkv.cluster.roster import Roster
from flowkv.config import RestartConfig, SchedulingConfig, ServerConfig, SloConfig
from flowkv.errors import ProtocolError
from flowkv.messages import (
    Abort,
    ClusterStatus,
    FlipInstance,
    FrontendExited,
    FrontendHello,
    InstanceExited,
    Introduce,
    LoadReport,
    Message,
    PeerDown,
    PeerUp,
    Register,
    Registered,
    RegistrationRefused,
    RestartInstances,
    Submit,
)
from flowkv.types import InstanceLoad, InstanceStatus, ModelInfo, Role

_STATUS_INTERVAL_S = 0.25
_LOOK_INTERVAL_S = 0.1
_MAX_ELAPSED_S = 1.0  # between two looks at the clock: after a longer stop the messages of that time are still unread


class Controller:
    """Messages in by `handle`, messages out by `take_messages` as (address, message) pairs.

    `num_instances` is how many must be in service before the cluster is ready, `epoch` what instances of this cluster
    were started with, `backend` is that of `TransferConfig`. `launcher_address` is who starts and stops instances;
    None: nobody does. `name` tells this controller from earlier ones of the cluster; one that takes the
    place of another has a `rebuild`.
    """

    def __init__(
        self,
        num_instances: int,
        epoch: str,
        backend: str,
        *,
        slo: SloConfig | None = None,
        scheduling: SchedulingConfig | None = None,
        launcher_address: str | None = None,
        name: str = "controller",
        rebuild: Rebuild | None = None,
        restart: RestartConfig | None = None,
        drain_timeout_s: float = ServerConfig().drain_timeout_s,
    ) -> None:
        self._name = name
        self._num_instances = num_instances
        self._epoch = epoch
        self._backend = backend
        self._last_tick_s: float | None = None
        self._frontends: dict[str, str] = {}  # name -> address
        slo, scheduling = slo or SloConfig(), scheduling or SchedulingConfig()
        self._fleet = Fleet(slo, scheduling)
        self._views = self._fleet.views
        self._overload = Overload(slo, scheduling)
        self.roster = Roster(
            self._fleet, scheduling, restart or RestartConfig(), drain_timeout_s, num_instances, launcher_address,
            self._send,
        )  # fmt: skip
        self._newcomers = Newcomers(self._views, self._admit)
        self._dead: set[str] = set()
        self._requests = Requests(
            name, self._fleet, self._overload, self._frontends, self._dead, self._send, rebuild
        )  # fmt: skip
        self._is_successor = rebuild is not None
        self._model: ModelInfo | None = None
        self._status_due_s = 0.0
        self._out: list[tuple[str, Message]] = []
        self.gone_addresses: list[str] = []  # nobody listens there any more; whoever sends may forget them

    # --- in and out ------------------------------------------------------------------------------------------------

    def handle(self, message: Message, now_s: float) -> None:
        match message:
            case Submit():
                self._requests.submit(message, now_s)
            case Abort():
                self._requests.abort(message)
            case LoadReport():
                self._on_load_report(message, now_s)
            case Register():
                self._on_register(message)
            case FrontendHello() if message.frontend in self._dead:
                pass  # the news of its end came first
            case FrontendHello():
                self._frontends[message.frontend] = message.address
                self._send(message.address, self._status())
            case InstanceExited():
                self._on_exited(message)
            case RestartInstances():
                self.roster.restart_in_turn(message.instances, message.token)
            case FlipInstance():
                self.roster.flip(message.instance, message.role, now_s)
            case FrontendExited():
                self._on_frontend_exited(message)
            case _:
                raise ProtocolError(f"a controller does not take a {type(message).__name__}")

    def tick(self, now_s: float) -> None:
        """Called often, when all messages are handled: looks who is silent and who should do what; tells frontends."""
        elapsed_s = 0.0 if self._last_tick_s is None else now_s - self._last_tick_s
        if self._last_tick_s is not None and elapsed_s < _LOOK_INTERVAL_S:
            return
        self._last_tick_s = now_s
        if now_s >= self._status_due_s:
            self._requests.tell_lost_again()
        self._pass_time(min(elapsed_s, _MAX_ELAPSED_S), now_s)
        self.roster.look(now_s)
        if now_s >= self._status_due_s:
            self._status_due_s = now_s + _STATUS_INTERVAL_S
            self._broadcast_status()

    def _pass_time(self, elapsed_s: float, now_s: float) -> None:
        self._requests.pass_time(elapsed_s, now_s)
        for view in list(self._views.values()):
            if view.pass_time(elapsed_s, STALL_S) and view.is_in_service:
                self._on_stalled(view)
            if view.liveness.take_hang(STALL_S):
                self.roster.hangs(view)
            if view.unanswered:
                self._requests.settle_unanswered(view)

    def take_messages(self) -> list[tuple[str, Message]]:
        messages, self._out = self._out, []
        return messages

    @property
    def num_assignments(self) -> int:
        return len(self._requests)

    def _on_frontend_exited(self, message: FrontendExited) -> None:
        """Its requests end everywhere."""
        self._dead.add(message.frontend)
        self._requests.frontend_gone(message.frontend)
        if (address := self._frontends.pop(message.frontend, None)) is None:
            return
        self.gone_addresses.append(address)
        for view in self._views.values():
            self._send(view.peer.address, FrontendExited(message.frontend, address))

    # --- instances -------------------------------------------------------------------------------------------------

    def _on_register(self, message: Register) -> None:
        name = message.peer.instance
        if name in self._dead:
            return  # the news of its end came first
        if name in self._views:
            return
        if (reason := mismatch(message, self._epoch, self._model, self._views.values(), self._backend)) is not None:
            self._send(message.peer.address, RegistrationRefused(reason))
            return
        self._model = message.model
        for view in self._views.values():
            self._send(view.peer.address, PeerUp(message.peer))
            self._send(message.peer.address, PeerUp(view.peer))
        self._fleet.add(message).is_draining = message.is_draining
        self._requests.registered(message)
        if self._is_successor:  # the one before it may have told nobody
            for dead in self._dead:
                self._send(message.peer.address, PeerDown(dead))
        if message.is_draining:  # whatever for: it takes nothing more
            self.roster.restart_in_turn([name])
        self._newcomers.add(name)

    def _admit(self, newcomer: InstanceView) -> None:
        """Into service."""
        self._fleet.refresh(newcomer)
        num_available = sum(view.is_available for view in self._views.values())
        self._requests.has_served = self._requests.has_served or num_available >= self._num_instances
        self._send(newcomer.peer.address, Registered())
        if self._requests.has_served:
            self._broadcast_status()

    def _on_load_report(self, message: LoadReport, now_s: float) -> None:
        if (view := self._views.get(message.instance)) is None:
            if message.instance not in self._dead and message.address:
                self._send(message.address, Introduce())
            return  # if it died: what it held is settled
        was_stalled, old = view.liveness.is_stalled, view.role
        if self._fleet.apply(message, now_s):
            self.roster.flipped(view, old, now_s)
        if was_stalled:
            self._broadcast_status()
        self._newcomers.note_links(message)
        self._requests.apply(message, view, now_s)
        self.roster.reported(view)

    def _on_exited(self, message: InstanceExited) -> None:
        """What it held goes on elsewhere; everyone forgets it."""
        name = message.instance
        self._dead.add(name)
        self.roster.exited(message)
        gone = self._fleet.remove(name)
        self._requests.instance_gone(name, was_stopped=gone is not None and gone.is_stopping)
        if gone is None and not self._requests.is_rebuilding:
            self.roster.did_not_start(name)
            return
        for view in self._views.values():
            view.links.pop(name, None)
            self._send(view.peer.address, PeerDown(name))
        if gone is not None:
            self.gone_addresses.append(gone.peer.address)
            self._newcomers.forget(name)
            self._broadcast_status()

    def _on_stalled(self, view: InstanceView) -> None:
        """Nothing has been heard of it for too long: what it holds goes on elsewhere, and nothing more goes there until
        it is back.

        The `Abort`s wait for it behind what was sent before, so that it runs nothing of this when it wakes.
        """
        self._fleet.refresh(view)
        self._requests.lose_all(view.name, died=True)
        self._newcomers.forget(view.name)
        self._broadcast_status()

    # --- status ----------------------------------------------------------------------------------------------------

    def loads(self) -> list[tuple[str, Role, InstanceLoad, int]]:
        """(Name, role, load, blocks of the pool) of every instance, as last reported."""
        return [(view.name, view.role, view.load, view.peer.pool.num_blocks) for view in self._views.values()]

    def statuses(self) -> list[InstanceStatus]:
        """What is known of every instance."""
        return [view.status() for view in self._views.values()]

    def _status(self) -> ClusterStatus:
        room = max((view.pool_tokens for view in self._views.values()), default=0)
        if self._model is not None:
            room = min(room, self._model.max_model_tokens)
        is_open = not self._requests.is_settled or any(view.is_available for view in self._views.values())
        return ClusterStatus(
            self._requests.has_served and is_open, self._model, room, self.statuses(), self.roster.regime,
            len(self.roster.flips), self._overload.num_refused, self._requests.num_lost, self._name,
            self.roster.rolling,
        )  # fmt: skip

    def _broadcast_status(self) -> None:
        if self._frontends:
            status = self._status()
            for address in self._frontends.values():
                self._send(address, status)

    def _send(self, address: str, message: Message) -> None:
        self._out.append((address, message))
