"""The cluster as a state machine: places requests, keeps the picture of every instance, tells everyone who is there."""

from dataclasses import dataclass

import msgspec

from flowkv.cluster.admission import mismatch
from flowkv.cluster.fleet import Fleet
from flowkv.cluster.liveness import stall_timeout_s
from flowkv.cluster.load import InstanceView
from flowkv.cluster.overload import Overload
from flowkv.cluster.policy import Ask
from flowkv.cluster.roles import Flip
from flowkv.cluster.scheduler import Placement
from flowkv.config import SchedulingConfig, SloConfig, TransferConfig
from flowkv.errors import ProtocolError
from flowkv.messages import (
    RESTART_MARK,
    Abort,
    Accepted,
    ClusterStatus,
    Dispatch,
    Drain,
    FrontendExited,
    FrontendHello,
    InstanceExited,
    LoadReport,
    Message,
    PeerDown,
    PeerUp,
    Register,
    Registered,
    RegistrationRefused,
    Rejected,
    SetRole,
    StartInstance,
    StopInstance,
    Submit,
)
from flowkv.types import DEFERRED, InstanceLoad, InstanceStatus, ModelInfo, Regime, Request, Role

_STATUS_INTERVAL_S = 0.25
_LOOK_INTERVAL_S = 0.1
_MAX_ELAPSED_S = 1.0  # between two looks at the clock: after a longer stop the messages of that time are still unread
_MAX_SETTLED = 10_000


@dataclass(slots=True)
class Assignment:
    """Where a request that was accepted is. `instances` may each hold some of it; `owner` answers for it, and `home` is
    where it decodes or will, as far as is known."""

    frontend: str
    request: Request
    instances: list[str]
    owner: str
    home: str


class Controller:
    """Messages in by `handle`, messages out by `take_messages` as (address, message) pairs.

    `num_instances` is how many must be in service before the cluster is ready, `epoch` what instances of this cluster
    were started with, `backend` and `lease_s` are those of `TransferConfig`. `launcher_address` is who starts and stops
    instances; None: nobody does.
    """

    def __init__(
        self,
        num_instances: int,
        epoch: str,
        backend: str,
        lease_s: float = TransferConfig().lease_s,
        *,
        slo: SloConfig | None = None,
        scheduling: SchedulingConfig | None = None,
        launcher_address: str | None = None,
    ) -> None:
        self._num_instances = num_instances
        self._epoch = epoch
        self._backend = backend
        self._scheduling = scheduling or SchedulingConfig()
        self._launcher_address = launcher_address
        self._stall_timeout_s = stall_timeout_s(lease_s)
        self._last_tick_s: float | None = None
        self._frontends: dict[str, str] = {}  # name -> address
        self._fleet = Fleet(slo or SloConfig(), self._scheduling)
        self._views = self._fleet.views
        self._overload = Overload(slo or SloConfig(), self._scheduling)
        self._missing: dict[str, set[str]] = {}  # by newcomer: those in service with which it has no links yet
        self._dead: set[str] = set()
        self._assignments: dict[str, Assignment] = {}
        # Answers to those that ended lately, by id, oldest first: a repeated `Submit` runs nothing twice.
        self._settled: dict[str, Accepted | Rejected] = {}
        self._model: ModelInfo | None = None
        self._was_complete = False
        self._status_due_s = 0.0
        self._roles_due_s = 0.0
        self._num_wanted = num_instances  # that run or are being started, if nobody else starts any
        self._out: list[tuple[str, Message]] = []
        self.regime = Regime.NORMAL
        self.flips: list[Flip] = []
        self.gone_addresses: list[str] = []  # nobody listens there any more; whoever sends may forget them

    # --- in and out ------------------------------------------------------------------------------------------------

    def handle(self, message: Message, now_s: float) -> None:
        match message:
            case Submit():
                self._on_submit(message, now_s)
            case Abort():
                self._on_abort(message)
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
        for view in list(self._views.values()):
            if view.pass_time(min(elapsed_s, _MAX_ELAPSED_S), self._stall_timeout_s) and view.is_in_service:
                self._on_stalled(view)
            if view.unanswered:
                self._settle_unanswered(view)
        if now_s >= self._roles_due_s:
            self._roles_due_s = now_s + self._scheduling.interval_s
            self._set_roles(now_s)
        if now_s >= self._status_due_s:
            self._status_due_s = now_s + _STATUS_INTERVAL_S
            self._broadcast_status()

    def take_messages(self) -> list[tuple[str, Message]]:
        messages, self._out = self._out, []
        return messages

    @property
    def num_assignments(self) -> int:
        return len(self._assignments)

    # --- requests --------------------------------------------------------------------------------------------------

    def _on_submit(self, message: Submit, now_s: float) -> None:
        address = self._frontends.get(message.frontend)
        if address is None:
            raise ProtocolError(f"frontend {message.frontend} submits before it has said hello")
        request = message.request
        if request.request_id in self._assignments:
            self._send(address, Accepted(request.request_id))
            return
        if (answer := self._settled.get(request.request_id)) is not None:
            self._send(address, answer)
            return
        ask = self._fleet.ask(request)
        placement = self._fleet.place(ask, request)
        if placement is None:
            self._send(address, self._why_nowhere(request))
            return
        self._fleet.come(ask, now_s)
        refused = self._overload.refusal(
            request.request_id, ask, placement, self._views.values(), self._fleet.knows_costs
        )  # fmt: skip
        if refused is not None:
            self._send(address, refused)
            self._remember(refused)
            return
        self._send(address, Accepted(request.request_id))
        self._dispatch(message.frontend, request, ask, placement, now_s)

    def _dispatch(self, frontend: str, request: Request, ask: Ask, placement: Placement, now_s: float) -> None:
        """To where it goes, or behind all others if it is late wherever it goes: so it makes nobody else late."""
        sent = request
        if self._fleet.knows_costs and self._overload.is_hopeless(placement):
            sent = msgspec.structs.replace(request, priority=request.priority + DEFERRED)
            ask = self._fleet.ask(sent)
            placement = self._fleet.place(ask, sent) or placement
        home = placement.decode[0] if placement.decode else placement.prefill
        names = [placement.prefill, *placement.decode]
        self._assignments[request.request_id] = Assignment(frontend, request, names, placement.prefill, home)
        sequence = self._fleet.assign(sent, ask, placement, now_s)
        dispatch = Dispatch(sequence, sent, 0, self._frontends[frontend], placement.decode)
        self._send(self._views[placement.prefill].peer.address, dispatch)

    def _place_again(self, request_id: str, now_s: float) -> None:
        """An instance has given it back before it began."""
        if (assignment := self._assignments.get(request_id)) is None:
            return
        self._fleet.forget(request_id, assignment.instances[0], assignment.home)
        ask = self._fleet.ask(assignment.request)
        placement = self._fleet.place(ask, assignment.request)
        if placement is None:
            self._fail(
                request_id, "the instance that held this request is being retired, and no other can", "unavailable"
            )
        else:
            self._dispatch(assignment.frontend, assignment.request, ask, placement, now_s)

    def _why_nowhere(self, request: Request) -> Rejected:
        if not any(view.is_available for view in self._views.values()):
            return Rejected(request.request_id, 503, self._why_unavailable(), "unavailable")
        return self._too_large(request)

    def _why_unavailable(self) -> str:
        if any(view.is_in_service for view in self._views.values()):
            return "every instance is stalled"
        return "every instance is down" if self._was_complete else "no instance is ready"

    def _too_large(self, request: Request) -> Rejected:
        most = max(view.max_choices for view in self._views.values())
        if request.sampling.n > most:
            text = f"n ({request.sampling.n}) is more than the {most} choices that an instance decodes at once"
            return Rejected(request.request_id, 400, text, "too_many_choices", "n")
        room = max(view.pool_tokens for view in self._views.values())
        text = (
            f"prompt ({len(request.prompt_ids)} tokens) and max_tokens ({request.sampling.max_tokens}) together need "
            f"more than the {room} tokens that the largest KV pool holds"
        )
        return Rejected(request.request_id, 400, text, "context_length_exceeded", "max_tokens")

    def _on_abort(self, message: Abort) -> None:
        """A request that is settled here but still gives outputs somewhere is aborted wherever it may be."""
        assignment = self._assignments.get(message.request_id)
        for name in assignment.instances if assignment else list(self._views):
            if name in self._views:
                self._send(self._views[name].peer.address, message)

    def _on_frontend_exited(self, message: FrontendExited) -> None:
        """Its requests end everywhere."""
        self._dead.add(message.frontend)
        for request_id in [r for r, a in self._assignments.items() if a.frontend == message.frontend]:
            self._on_abort(Abort(request_id))
            self._settle(request_id)
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
        if (reason := mismatch(message, self._epoch, self._model, self._views.values(), self._backend)) is not None:
            self._send(message.peer.address, RegistrationRefused(reason))
            return
        self._model = message.model
        for view in self._views.values():
            self._send(view.peer.address, PeerUp(message.peer))
            self._send(message.peer.address, PeerUp(view.peer))
        self._missing[name] = {view.name for view in self._views.values() if view.is_available}
        self._fleet.add(message)
        self._admit_complete()

    def _note_links(self, message: LoadReport) -> None:
        """Links that came up may be the last that a newcomer waited for."""
        if not self._missing:
            return
        mine = self._views[message.instance]
        for link in message.links:
            other = self._views.get(link.peer)
            if other is not None and other.is_linked_to(mine):
                for one, two in ((mine.name, other.name), (other.name, mine.name)):
                    self._missing.get(one, set()).discard(two)
        self._admit_complete()

    def _admit_complete(self) -> None:
        """Into service with the links that they need: the first request must not wait for a connection.

        Those to a stalled instance come up when it is back.
        """
        for name in [name for name, missing in self._missing.items() if not missing]:
            if not self._missing[name]:  # one that was just admitted may be missing to it
                self._admit(self._views[name])

    def _admit(self, newcomer: InstanceView) -> None:
        del self._missing[newcomer.name]
        newcomer.is_in_service = True
        self._fleet.refresh(newcomer)
        for name, missing in self._missing.items():
            other = self._views[name]
            if not (other.is_linked_to(newcomer) and newcomer.is_linked_to(other)):
                missing.add(newcomer.name)
        num_available = sum(view.is_available for view in self._views.values())
        self._was_complete = self._was_complete or num_available >= self._num_instances
        self._send(newcomer.peer.address, Registered())
        if self._was_complete:
            self._broadcast_status()

    def _on_load_report(self, message: LoadReport, now_s: float) -> None:
        if (view := self._views.get(message.instance)) is None:
            return  # it died; what it held is settled
        was_stalled, old = view.liveness.is_stalled, view.role
        if self._fleet.apply(message, now_s):
            view.num_flips += 1
            self.flips.append(Flip(now_s, view.name, old, view.role, self.regime))
        if was_stalled:
            self._broadcast_status()
        self._note_links(message)
        for request_id, owner in message.handed_over:
            self._on_handed_over(request_id, owner)
        for request_id in message.returned:
            self._place_again(request_id, now_s)
        for request_id, num_output_tokens in message.finished:
            self._learn_length(request_id, num_output_tokens)
            self._settle(request_id)
        self._settle_unanswered(view)
        if view.is_drained and view.is_draining and not view.is_stopping:
            self._stop(view)

    def _learn_length(self, request_id: str, num_output_tokens: int) -> None:
        if num_output_tokens and (assignment := self._assignments.get(request_id)) is not None:
            request = assignment.request
            self._fleet.lengths.learn(len(request.prompt_ids), num_output_tokens // request.sampling.n)

    def _on_handed_over(self, request_id: str, owner: str) -> None:
        if (assignment := self._assignments.get(request_id)) is None:
            return
        assignment.owner = owner
        self._fleet.move_home(request_id, assignment.home, owner)
        assignment.home = owner
        if owner in self._dead:
            self._fail(request_id, f"instance {owner} died while it held this request", "instance_died")
        elif self._is_stalled(owner):
            self._fail_stalled(request_id, owner)

    def _on_exited(self, message: InstanceExited) -> None:
        """What it held ends with an error; everyone forgets it."""
        self._dead.add(message.instance)
        if (gone := self._fleet.remove(message.instance)) is None:
            self._num_wanted -= RESTART_MARK not in message.instance  # one that was added could not start
            return
        self._forget_newcomer(message.instance)
        self.gone_addresses.append(gone.peer.address)
        for view in self._views.values():
            self._send(view.peer.address, PeerDown(message.instance))
        for request_id in [r for r, a in self._assignments.items() if a.owner == message.instance]:
            self._fail(request_id, f"instance {message.instance} died while it held this request", "instance_died")
        self._broadcast_status()

    def _forget_newcomer(self, name: str) -> None:
        """Nobody waits for it any more."""
        self._missing.pop(name, None)
        for missing in self._missing.values():
            missing.discard(name)
        self._admit_complete()

    def _on_stalled(self, view: InstanceView) -> None:
        """Nothing has been heard of it for too long: what it holds ends, and nothing more goes there until it is back.

        The `Abort`s wait for it behind what was sent before, so that it runs nothing of this when it wakes.
        """
        self._fleet.refresh(view)
        for request_id in [r for r, a in self._assignments.items() if a.owner == view.name]:
            self._fail_stalled(request_id, view.name)
        self._forget_newcomer(view.name)
        self._broadcast_status()

    def _settle_unanswered(self, view: InstanceView) -> None:
        """What it may have handed over to a peer that is silent: ended here, if there is no hope or it has ended."""
        for (request_id, peer), seconds in list(view.unanswered.items()):
            if request_id not in self._assignments:
                self._send(view.peer.address, Abort(request_id))
            elif seconds >= self._stall_timeout_s or self._is_stalled(peer):
                self._fail_stalled(request_id, peer)
            else:
                continue
            del view.unanswered[request_id, peer]

    def _is_stalled(self, name: str) -> bool:
        return name in self._views and self._views[name].liveness.is_stalled

    def _fail_stalled(self, request_id: str, instance: str) -> None:
        self._fail(request_id, f"instance {instance} stalled while it held this request", "instance_stalled")

    def _fail(self, request_id: str, reason: str, code: str) -> None:
        assignment = self._assignments[request_id]
        self._on_abort(Abort(request_id))
        self._send(self._frontends[assignment.frontend], Rejected(request_id, 500, reason, code))
        self._settle(request_id)

    def _settle(self, request_id: str) -> None:
        if (assignment := self._assignments.pop(request_id, None)) is None:
            return
        self._fleet.forget(request_id, assignment.instances[0], assignment.home)
        self._remember(Accepted(request_id))

    def _remember(self, answer: Accepted | Rejected) -> None:
        self._settled[answer.request_id] = answer
        if len(self._settled) > _MAX_SETTLED:
            del self._settled[next(iter(self._settled))]

    # --- roles and scale -------------------------------------------------------------------------------------------

    def _set_roles(self, now_s: float) -> None:
        verdict = self._fleet.look(now_s)
        self.regime = verdict.regime
        for name, role in verdict.flips:
            view = self._views[name]
            view.wanted_role, view.flipped_s = role, now_s
            self._fleet.refresh(view)
            self._send(view.peer.address, SetRole(role))
        if verdict.scale > 0:
            self._scale_out()
        elif verdict.scale < 0:
            self._scale_in()

    def _scale_out(self) -> None:
        """Ask for one more, of the role that there is less of."""
        num_instances = max(len(self._views), self._num_wanted)
        if self._launcher_address is None or num_instances >= self._scheduling.max_instances:
            return
        roles = [view.wanted_role for view in self._views.values()]
        role = Role.MIXED if Role.MIXED in roles else min((Role.PREFILL, Role.DECODE), key=roles.count)
        self._num_wanted = num_instances + 1
        self._send(self._launcher_address, StartInstance(role))

    def _scale_in(self) -> None:
        num_available = sum(view.is_available for view in self._views.values())
        if not self._scheduling.min_instances or num_available <= self._scheduling.min_instances:
            return
        if self._launcher_address is not None and (view := self._fleet.to_retire()) is not None:
            view.is_draining = True
            self._fleet.refresh(view)
            self._send(view.peer.address, Drain())

    def _stop(self, view: InstanceView) -> None:
        """It holds nothing any more, and nothing is on its way to it."""
        if self._launcher_address is not None and not view.has_unseen and not view.homes:
            self._num_wanted -= 1
            view.is_stopping = True
            self._send(self._launcher_address, StopInstance(view.name))

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
        is_ready = self._was_complete and any(view.is_available for view in self._views.values())
        return ClusterStatus(
            is_ready, self._model, room, self.statuses(), self.regime, len(self.flips), self._overload.num_refused
        )  # fmt: skip

    def _broadcast_status(self) -> None:
        if self._frontends:
            status = self._status()
            for address in self._frontends.values():
                self._send(address, status)

    def _send(self, address: str, message: Message) -> None:
        self._out.append((address, message))
