"""The requests of the cluster: where each attempt is placed, and what becomes of one whose instance is lost."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from flowkv.cluster.fleet import Fleet
from flowkv.cluster.liveness import STALL_S
from flowkv.cluster.load import InstanceView
from flowkv.cluster.overload import Overload
from flowkv.cluster.policy import Ask
from flowkv.cluster.rebuild import Rebuild
from flowkv.cluster.scheduler import Placement
from flowkv.cluster.settled import Settled
from flowkv.errors import ProtocolError
from flowkv.messages import Abort, Accepted, Dispatch, LoadReport, Lost, Message, Register, Rejected, Submit
from flowkv.types import DEFERRED, OutputIds, Request


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


class Requests:
    """`frontends` (addresses by name) and `dead` (names of processes) are their controller's, as is its `name`."""

    def __init__(
        self,
        name: str,
        fleet: Fleet,
        overload: Overload,
        frontends: dict[str, str],
        dead: set[str],
        send: Callable[[str, Message], None],
        rebuild: Rebuild | None = None,
    ) -> None:
        self._name = name
        self._fleet = fleet
        self._views = fleet.views
        self._overload = overload
        self._frontends = frontends
        self._dead = dead
        self._send = send
        self._rebuild = rebuild
        self._assignments: dict[str, Assignment] = {}
        # Answers to those that ended lately, by id, oldest first: a repeated `Submit` runs nothing twice.
        self._settled = Settled()
        self._lost: dict[str, tuple[str, Lost]] = {}  # that their frontend has not taken back yet, with that frontend
        self.num_lost = 0
        self.has_served = rebuild is not None  # as many instances as there should be were there once

    def __len__(self) -> int:
        return len(self._assignments)

    @property
    def is_rebuilding(self) -> bool:
        """Something of an earlier controller's time may still turn up."""
        return self._rebuild is not None

    @property
    def is_settled(self) -> bool:
        """What ran under an earlier controller is known: before that what comes is kept."""
        return self._rebuild is None or self._rebuild.is_settled

    # --- they come -------------------------------------------------------------------------------------------------

    def submit(self, message: Submit, now_s: float) -> None:
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
            self._tell_lost(Lost(request.request_id), message.frontend)
            return
        if message.resumes is not None:
            self._take_back(message.resumes)
        self._place_new(message, address, now_s)

    def _place_new(self, message: Submit, address: str, now_s: float) -> None:
        """Find a place for what is not running anywhere. What was accepted before is not refused for want of one."""
        request, is_new = message.request, message.resumes is None
        ask, placement = self._plan(message)
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

    def _plan(self, message: Submit) -> tuple[Ask, Placement | None]:
        """What it asks for, and the best place for it; None if no instance that takes requests can hold it."""
        ask = self._fleet.ask(message.request, message.output_ids)
        return ask, self._fleet.place(ask, message.request, is_begun=bool(message.output_ids))

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
        return "every instance is down" if self.has_served else "no instance is ready"

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

    # --- they end, or are lost ----------------------------------------------------------------------------------------

    def abort(self, message: Abort) -> None:
        """A request that is settled here but still gives outputs somewhere is aborted wherever it may be."""
        self._lost.pop(message.request_id, None)
        if self._rebuild is not None:
            self._rebuild.drop(message.request_id)
        assignment = self._assignments.get(message.request_id)
        for name in assignment.instances if assignment else list(self._views):
            if name in self._views:
                self._send(self._views[name].peer.address, message)

    def frontend_gone(self, frontend: str) -> None:
        """Its requests end everywhere."""
        for request_id in [r for r, a in self._assignments.items() if a.frontend == frontend]:
            self.abort(Abort(request_id))
            self._settle(request_id)
        self._lost = {request_id: lost for request_id, lost in self._lost.items() if lost[0] != frontend}
        if self._rebuild is not None:
            self._rebuild.frontend_gone(frontend)

    def _settle(self, request_id: str) -> None:
        if (assignment := self._assignments.pop(request_id, None)) is None:
            return
        self._fleet.forget(request_id, assignment.instances[0], assignment.home)
        self._settled.remember(Accepted(request_id))

    def _take_back(self, request_id: str) -> None:
        """The frontend has given this attempt up, of its own accord or because it was lost."""
        self._lost.pop(request_id, None)
        if request_id in self._assignments:
            self.abort(Abort(request_id))
            self._settle(request_id)

    def pass_time(self, elapsed_s: float, now_s: float) -> None:
        self._settled.pass_time(now_s)
        if self._rebuild is not None:
            self._go_on_rebuilding(self._rebuild, elapsed_s, now_s)

    def tell_lost_again(self) -> None:
        """What is lost, to those who have not answered."""
        for frontend, lost in self._lost.values():
            self._send(self._frontends[frontend], lost)

    def lose_all(self, instance: str, *, died: bool) -> None:
        """`died`: of itself, or it hangs."""
        for request_id in [r for r, a in self._assignments.items() if a.owner == instance]:
            self._lose(request_id, died=died)

    def _lose(self, request_id: str, *, died: bool = False) -> None:
        """Whoever answers for this attempt cannot go on. Its frontend knows what came of it, and submits the rest."""
        frontend = self._assignments[request_id].frontend
        self.abort(Abort(request_id))
        self._settle(request_id)
        self._tell_lost(Lost(request_id, died), frontend)

    def _tell_lost(self, lost: Lost, frontend: str) -> None:
        self.num_lost += 1
        self._lost[lost.request_id] = frontend, lost
        self._send(self._frontends[frontend], lost)

    def _go_on_rebuilding(self, rebuild: Rebuild, elapsed_s: float, now_s: float) -> None:
        for message in rebuild.pass_time(elapsed_s):
            self.submit(message, now_s)
        if rebuild.is_over:
            for request_id, name in rebuild.unclaimed():
                if name in self._views:
                    self._send(self._views[name].peer.address, Abort(request_id))
            self._rebuild = None

    # --- instances -------------------------------------------------------------------------------------------------

    def apply(self, message: LoadReport, view: InstanceView, now_s: float) -> None:
        """What an instance says of the requests that it holds, held, or should hold."""
        for request_id, owner in message.handed_over:
            self._on_handed_over(request_id, owner)
        for request_id in message.returned:
            self._place_again(request_id, now_s)
        for request_id, num_output_tokens in message.finished:
            self._learn_length(request_id, num_output_tokens)
            self._settle(request_id)
        if self._rebuild is not None:
            self._rebuild.hear(message)
        self.settle_unanswered(view)
        self._lose_missed(view)

    def registered(self, message: Register) -> None:
        """It may hold requests of an earlier controller's."""
        if self._rebuild is not None:
            self._rebuild.registered(message)

    def instance_gone(self, name: str, *, was_stopped: bool) -> None:
        """What it held goes on elsewhere. `was_stopped`: by its launcher, as the controller wanted."""
        if self._rebuild is not None:
            self._rebuild.gone(name)
        self.lose_all(name, died=not was_stopped)

    def _place_again(self, request_id: str, now_s: float) -> None:
        """An instance has given it back before it began."""
        if (assignment := self._assignments.get(request_id)) is None:
            return
        self._fleet.forget(request_id, assignment.instances[0], assignment.home)
        message = Submit(assignment.frontend, assignment.request, assignment.output_ids)
        ask, placement = self._plan(message)
        if placement is None:
            self._lose(request_id)
        else:
            self._dispatch(message, ask, placement, now_s)

    def _learn_length(self, request_id: str, num_output_tokens: int) -> None:
        if num_output_tokens and (assignment := self._assignments.get(request_id)) is not None:
            request = assignment.request
            self._fleet.lengths.learn(len(request.prompt_ids), num_output_tokens // request.sampling.n)

    def _on_handed_over(self, request_id: str, owner: str) -> None:
        if (assignment := self._assignments.get(request_id)) is None:
            return
        assignment.owner = owner
        if owner not in assignment.instances:
            assignment.instances.append(owner)
        self._fleet.move_home(request_id, assignment.home, owner)
        assignment.home = owner
        if owner in self._dead or self._is_stalled(owner):
            self._lose(request_id, died=True)

    def settle_unanswered(self, view: InstanceView) -> None:
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

    def _lose_missed(self, view: InstanceView) -> None:
        """It lives, and a dispatch has not come to it."""
        missed, view.missed = view.missed, []
        for request_id in missed:
            if (assignment := self._assignments.get(request_id)) is not None and assignment.owner == view.name:
                self._lose(request_id)

    def _is_stalled(self, name: str) -> bool:
        return name in self._views and self._views[name].liveness.is_stalled
