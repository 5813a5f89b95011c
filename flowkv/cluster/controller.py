"""The cluster as a state machine: places requests, keeps the picture of every instance, tells everyone who is there."""

from dataclasses import dataclass

import msgspec

from flowkv.cluster.admission import mismatch
from flowkv.cluster.fleet import Fleet
from flowkv.cluster.liveness import STALL_S
from flowkv.cluster.load import InstanceView
from flowkv.cluster.overload import Overload
from flowkv.cluster.policy import Ask
from flowkv.cluster.rebuild import Rebuild
from flowkv.cluster.roles import Flip
from flowkv.cluster.rolling import Rolling
from flowkv.cluster.scheduler import Placement
from flowkv.cluster.settled import Settled
from flowkv.config import RestartConfig, SchedulingConfig, ServerConfig, SloConfig
from flowkv.errors import ProtocolError
from flowkv.messages import (
    RESTART_MARK,
    Abort,
    Accepted,
    ClusterStatus,
    Dispatch,
    Drain,
    FlipInstance,
    FrontendExited,
    FrontendHello,
    InstanceExited,
    Introduce,
    LoadReport,
    Lost,
    Message,
    PeerDown,
    PeerUp,
    Register,
    Registered,
    RegistrationRefused,
    Rejected,
    RestartInstance,
    RestartInstances,
    SetRole,
    StartInstance,
    StopInstance,
    Submit,
)
from flowkv.types import DEFERRED, InstanceLoad, InstanceStatus, ModelInfo, OutputIds, Regime, Request, Role

_STATUS_INTERVAL_S = 0.25
_LOOK_INTERVAL_S = 0.1
_MAX_ELAPSED_S = 1.0  # between two looks at the clock: after a longer stop the messages of that time are still unread


@dataclass(slots=True)
class Assignment:
    """Where an attempt is. `instances` may each hold some of it; `owner` answers for it, and `home` is where it decodes
    or will, as far as is known. It goes on after `output_ids`."""

    frontend: str
    request: Request
    output_ids: OutputIds
    instances: list[str]
    owner: str
    home: str


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
        self._rebuild = rebuild
        self._num_instances = num_instances
        self._epoch = epoch
        self._backend = backend
        self._scheduling = scheduling or SchedulingConfig()
        self._launcher_address = launcher_address
        self._kills_hung = (restart or RestartConfig()).hung
        self._rolling = Rolling(drain_timeout_s, self._drain, self._restart)
        self._last_tick_s: float | None = None
        self._frontends: dict[str, str] = {}  # name -> address
        self._fleet = Fleet(slo or SloConfig(), self._scheduling)
        self._views = self._fleet.views
        self._overload = Overload(slo or SloConfig(), self._scheduling)
        self._missing: dict[str, set[str]] = {}  # by newcomer: those in service with which it has no links yet
        self._dead: set[str] = set()
        self._assignments: dict[str, Assignment] = {}
        # Answers to those that ended lately, by id, oldest first: a repeated `Submit` runs nothing twice.
        self._settled = Settled()
        self._model: ModelInfo | None = None
        self._lost: dict[str, str] = {}  # attempts that their frontend has not taken back yet, with that frontend
        self._num_lost = 0
        self._was_complete = rebuild is not None
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
            case RestartInstances():
                self._rolling.ask(message.instances, message.token)
            case FlipInstance() if (view := self._views.get(message.instance)) is not None:
                self._set_role(view, message.role, now_s)
            case FlipInstance():
                pass  # it has ended
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
        self._settled.pass_time(now_s)
        if now_s >= self._status_due_s:
            for request_id, frontend in self._lost.items():
                self._send(self._frontends[frontend], Lost(request_id))
        if self._rebuild is not None:
            self._go_on_rebuilding(self._rebuild, min(elapsed_s, _MAX_ELAPSED_S), now_s)
        for view in list(self._views.values()):
            if view.pass_time(min(elapsed_s, _MAX_ELAPSED_S), STALL_S) and view.is_in_service:
                self._on_stalled(view)
            if view.liveness.take_hang(STALL_S) and self._kills_hung and self._launcher_address is not None:
                self._send(self._launcher_address, RestartInstance(view.name, hangs=True))
            if view.unanswered:
                self._settle_unanswered(view)
        self._rolling.look(self._views, now_s)
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
        answer = self._settled.get(request.request_id)
        if answer is not None and not message.is_claim:
            self._send(address, answer)
            return
        if message.controller not in ("", self._name):
            return
        if self._rebuild is not None and message.is_claim and self._restore(self._rebuild, message):
            return
        if message.is_claim:
            self._tell_lost(request.request_id, message.frontend)
            return
        if message.resumes is not None:
            self._take_back(message.resumes)
        self._place_new(message, address, now_s)

    def _place_new(self, message: Submit, address: str, now_s: float) -> None:
        """Find a place for what is not running anywhere. What was accepted before is not refused for want of one."""
        request, is_new = message.request, message.resumes is None
        ask = self._fleet.ask(request, message.output_ids)
        placement = self._fleet.place(ask, request, is_begun=bool(message.output_ids))
        if placement is None:
            if is_new or any(view.is_available for view in self._views.values()):
                self._send(address, self._why_nowhere(request))
            return
        refused = self._refusal(request, ask, placement, now_s) if is_new else None
        if refused is not None:
            self._send(address, refused)
            self._settled.remember(refused)
            return
        self._send(address, Accepted(request.request_id))
        self._dispatch(message, ask, placement, now_s)

    def _refusal(self, request: Request, ask: Ask, placement: Placement, now_s: float) -> Rejected | None:
        self._fleet.come(ask, now_s)
        return self._overload.refusal(
            request.request_id, ask, placement, self._views.values(), self._fleet.knows_costs
        )  # fmt: skip

    def _dispatch(self, message: Submit, ask: Ask, placement: Placement, now_s: float) -> None:
        """To where it goes, or behind all others if it is late wherever it goes: so it makes nobody else late.

        One that has begun elsewhere waits for nobody.
        """
        sent = request = message.request
        if not message.output_ids and self._fleet.knows_costs and self._overload.is_hopeless(placement):
            sent = msgspec.structs.replace(request, priority=request.priority + DEFERRED)
            ask = self._fleet.ask(sent)
            placement = self._fleet.place(ask, sent) or placement
        home = placement.decode[0] if placement.decode else placement.prefill
        names = [placement.prefill, *placement.decode]
        self._assignments[request.request_id] = Assignment(
            message.frontend, request, message.output_ids, names, placement.prefill, home
        )
        sequence = self._fleet.assign(sent, ask, placement, now_s)
        address = self._frontends[message.frontend]
        dispatch = Dispatch(sequence, sent, address, placement.decode, message.output_ids)
        self._send(self._views[placement.prefill].peer.address, dispatch)

    def _place_again(self, request_id: str, now_s: float) -> None:
        """An instance has given it back before it began."""
        if (assignment := self._assignments.get(request_id)) is None:
            return
        self._fleet.forget(request_id, assignment.instances[0], assignment.home)
        message = Submit(assignment.frontend, assignment.request, assignment.output_ids)
        ask = self._fleet.ask(message.request, message.output_ids)
        placement = self._fleet.place(ask, message.request, is_begun=bool(message.output_ids))
        if placement is None:
            self._lose(request_id)
        else:
            self._dispatch(message, ask, placement, now_s)

    def _why_nowhere(self, request: Request) -> Rejected:
        if not any(view.is_available for view in self._views.values()):
            return Rejected(request.request_id, 503, self._why_unavailable(), "unavailable")
        if any(view.can_hold(request) for view in self._views.values()):
            text = "the only instances that could hold this request are stalled or draining, or not in service yet"
            return Rejected(request.request_id, 503, text, "unavailable")
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
        room = max(view.pool_tokens for view in self._views.values() if view.max_choices >= request.sampling.n)
        text = (
            f"prompt ({len(request.prompt_ids)} tokens) and max_tokens ({request.sampling.max_tokens}) together need "
            f"more than the {room} tokens that the largest KV pool holds"
        )
        return Rejected(request.request_id, 400, text, "context_length_exceeded", "max_tokens")

    def _on_abort(self, message: Abort) -> None:
        """A request that is settled here but still gives outputs somewhere is aborted wherever it may be."""
        self._lost.pop(message.request_id, None)
        if self._rebuild is not None:
            self._rebuild.drop(message.request_id)
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
        self._lost = {
            request_id: frontend for request_id, frontend in self._lost.items() if frontend != message.frontend
        }
        if self._rebuild is not None:
            self._rebuild.frontend_gone(message.frontend)
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
        self._missing[name] = {view.name for view in self._views.values() if view.is_available}
        self._fleet.add(message)
        if self._rebuild is not None:
            self._rebuild.registered(message)
            for dead in self._dead:
                self._send(message.peer.address, PeerDown(dead))
        if message.is_draining:  # whatever for: it takes nothing more
            self._rolling.ask([name])
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
            if message.instance not in self._dead and message.address:
                self._send(message.address, Introduce())
            return  # if it died: what it held is settled
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
        if self._rebuild is not None:
            self._rebuild.hear(message)
        self._settle_unanswered(view)
        self._lose_missed(view)
        if view.holds_nothing and view.is_draining and not view.is_stopping and not self._rolling.holds(view.name):
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
        if owner in self._dead or self._is_stalled(owner):
            self._lose(request_id)

    def _on_exited(self, message: InstanceExited) -> None:
        """What it held goes on elsewhere; everyone forgets it."""
        name = message.instance
        self._dead.add(name)
        gone = self._fleet.remove(name)
        if self._rebuild is not None:
            self._rebuild.gone(name)
        elif gone is None:
            self._num_wanted -= RESTART_MARK not in name  # one that was added could not start
            return
        for view in self._views.values():
            self._send(view.peer.address, PeerDown(name))
        if gone is not None:
            self.gone_addresses.append(gone.peer.address)
            self._forget_newcomer(name)
            self._lose_all(name)
            self._broadcast_status()

    def _forget_newcomer(self, name: str) -> None:
        """Nobody waits for it any more."""
        self._missing.pop(name, None)
        for missing in self._missing.values():
            missing.discard(name)
        self._admit_complete()

    def _on_stalled(self, view: InstanceView) -> None:
        """Nothing has been heard of it for too long: what it holds goes on elsewhere, and nothing more goes there until
        it is back.

        The `Abort`s wait for it behind what was sent before, so that it runs nothing of this when it wakes.
        """
        self._fleet.refresh(view)
        self._lose_all(view.name)
        self._forget_newcomer(view.name)
        self._broadcast_status()

    def _settle_unanswered(self, view: InstanceView) -> None:
        """What it may have handed over to a peer that is silent goes on elsewhere, if there is no hope; it is aborted
        here, if it does so already."""
        for (request_id, peer), seconds in list(view.unanswered.items()):
            if request_id not in self._assignments:
                self._send(view.peer.address, Abort(request_id))
            elif seconds >= STALL_S or self._is_stalled(peer):
                self._lose(request_id)
            else:
                continue
            del view.unanswered[request_id, peer]

    def _is_stalled(self, name: str) -> bool:
        return name in self._views and self._views[name].liveness.is_stalled

    def _lose_missed(self, view: InstanceView) -> None:
        """It lives, and a dispatch has not come to it."""
        missed, view.missed = view.missed, []
        for request_id in missed:
            if (assignment := self._assignments.get(request_id)) is not None and assignment.owner == view.name:
                self._lose(request_id)

    def _lose_all(self, instance: str) -> None:
        for request_id in [r for r, a in self._assignments.items() if a.owner == instance]:
            self._lose(request_id)

    def _lose(self, request_id: str) -> None:
        """Whoever answers for this attempt cannot go on. Its frontend knows what came of it, and submits the rest."""
        frontend = self._assignments[request_id].frontend
        self._on_abort(Abort(request_id))
        self._settle(request_id)
        self._tell_lost(request_id, frontend)

    def _tell_lost(self, request_id: str, frontend: str) -> None:
        self._num_lost += 1
        self._lost[request_id] = frontend
        self._send(self._frontends[frontend], Lost(request_id))

    def _take_back(self, request_id: str) -> None:
        """The frontend has given this attempt up, of its own accord or because it was lost."""
        self._lost.pop(request_id, None)
        if request_id in self._assignments:
            self._on_abort(Abort(request_id))
            self._settle(request_id)

    def _settle(self, request_id: str) -> None:
        if (assignment := self._assignments.pop(request_id, None)) is None:
            return
        self._fleet.forget(request_id, assignment.instances[0], assignment.home)
        self._settled.remember(Accepted(request_id))

    # --- after a restart -------------------------------------------------------------------------------------------

    def _go_on_rebuilding(self, rebuild: Rebuild, elapsed_s: float, now_s: float) -> None:
        for message in rebuild.pass_time(elapsed_s):
            self._on_submit(message, now_s)
        if rebuild.is_over:
            for request_id, name in rebuild.unclaimed():
                if name in self._views:
                    self._send(self._views[name].peer.address, Abort(request_id))
            self._rebuild = None

    def _restore(self, rebuild: Rebuild, message: Submit) -> bool:
        """Whether nothing else is to be done with it now: it runs already, or may."""
        request = message.request
        holder = rebuild.claim(request.request_id)
        if holder is None or holder not in self._views:
            if not rebuild.is_settled:
                rebuild.keep(message)
            return not rebuild.is_settled
        self._assignments[request.request_id] = Assignment(
            message.frontend, request, message.output_ids, [holder], holder, holder
        )
        self._fleet.adopt(request, self._fleet.ask(request, message.output_ids), holder)
        self._send(self._frontends[message.frontend], Accepted(request.request_id))
        return True

    # --- roles and scale -------------------------------------------------------------------------------------------

    def _set_roles(self, now_s: float) -> None:
        verdict = self._fleet.look(now_s)
        self.regime = verdict.regime
        for name, role in verdict.flips:
            self._set_role(self._views[name], role, now_s)
        if verdict.scale > 0:
            self._scale_out()
        elif verdict.scale < 0 and not self._rolling.is_active:
            self._scale_in()

    def _set_role(self, view: InstanceView, role: Role, now_s: float) -> None:
        view.wanted_role, view.flipped_s = role, now_s
        self._fleet.refresh(view)
        self._send(view.peer.address, SetRole(role))

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
            self._drain(view)

    def retire(self, name: str) -> None:
        """It finishes what it has, and is ended for good."""
        if (view := self._views.get(name)) is not None and not view.is_draining:
            self._drain(view)

    def _drain(self, view: InstanceView) -> None:
        view.is_draining = True
        self._fleet.refresh(view)
        self._send(view.peer.address, Drain())

    def _restart(self, view: InstanceView) -> None:
        view.is_stopping = True
        if self._launcher_address is not None:
            self._send(self._launcher_address, RestartInstance(view.name))

    def _stop(self, view: InstanceView) -> None:
        if self._launcher_address is not None:
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
        is_settled = self._rebuild is None or self._rebuild.is_settled  # before that what comes is kept
        is_ready = self._was_complete and (not is_settled or any(view.is_available for view in self._views.values()))
        return ClusterStatus(
            is_ready, self._model, room, self.statuses(), self.regime, len(self.flips), self._overload.num_refused,
            self._num_lost, self._name,
            self._rolling.status(),
        )  # fmt: skip

    def _broadcast_status(self) -> None:
        if self._frontends:
            status = self._status()
            for address in self._frontends.values():
                self._send(address, status)

    def _send(self, address: str, message: Message) -> None:
        self._out.append((address, message))
