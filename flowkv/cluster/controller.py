"""The cluster as a state machine: places requests, keeps the picture of every instance, tells everyone who is there."""

from dataclasses import dataclass

from flowkv.cluster.admission import mismatch
from flowkv.cluster.liveness import stall_timeout_s
from flowkv.cluster.load import InstanceView
from flowkv.cluster.scheduler import Placement, place
from flowkv.config import TransferConfig
from flowkv.errors import ProtocolError
from flowkv.messages import (
    Abort,
    Accepted,
    ClusterStatus,
    Dispatch,
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
    Submit,
)
from flowkv.types import InstanceLoad, ModelInfo, Request

_STATUS_INTERVAL_S = 0.25
_MAX_ELAPSED_S = 1.0  # between two looks at the clock: after a longer stop the messages of that time are still unread
_MAX_SETTLED = 10_000


@dataclass(slots=True)
class Assignment:
    """Where a request that was accepted is. `instances` may each hold some of it; `owner` answers for it."""

    frontend: str
    request: Request
    instances: list[str]
    owner: str


class Controller:
    """Messages in by `handle`, messages out by `take_messages` as (address, message) pairs.

    `num_instances` is how many must be in service before the cluster is ready, `epoch` what instances of this cluster
    were started with, `backend` and `lease_s` are those of `TransferConfig`.
    """

    def __init__(self, num_instances: int, epoch: str, backend: str, lease_s: float = TransferConfig().lease_s) -> None:
        self._num_instances = num_instances
        self._epoch = epoch
        self._backend = backend
        self._stall_timeout_s = stall_timeout_s(lease_s)
        self._last_tick_s: float | None = None
        self._frontends: dict[str, str] = {}  # name -> address
        self._views: dict[str, InstanceView] = {}
        self._dead: set[str] = set()
        self._assignments: dict[str, Assignment] = {}
        self._settled: dict[
            str, None
        ] = {}  # ids that ended lately, oldest first: a repeated `Submit` runs nothing twice
        self._model: ModelInfo | None = None
        self._was_complete = False
        self._status_due_s = 0.0
        self._out: list[tuple[str, Message]] = []
        self.gone_addresses: list[str] = []  # nobody listens there any more; whoever sends may forget them

    # --- in and out ------------------------------------------------------------------------------------------------

    def handle(self, message: Message, now_s: float) -> None:
        match message:
            case Submit():
                self._on_submit(message)
            case Abort():
                self._on_abort(message)
            case LoadReport():
                self._on_load_report(message)
            case Register():
                self._on_register(message)
            case FrontendHello():
                self._frontends[message.frontend] = message.address
                self._send(message.address, self._status())
            case InstanceExited():
                self._on_exited(message)
            case _:
                raise ProtocolError(f"a controller does not take a {type(message).__name__}")

    def tick(self, now_s: float) -> None:
        """Called often, when all messages are handled: looks who is silent, tells the frontends at a beat."""
        elapsed_s = 0.0 if self._last_tick_s is None else min(now_s - self._last_tick_s, _MAX_ELAPSED_S)
        self._last_tick_s = now_s
        for view in self._views.values():
            if view.pass_time(elapsed_s, self._stall_timeout_s) and view.is_in_service:
                self._on_stalled(view.name)
            self._settle_unanswered(view)
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

    def _on_submit(self, message: Submit) -> None:
        address = self._frontends.get(message.frontend)
        if address is None:
            raise ProtocolError(f"frontend {message.frontend} submits before it has said hello")
        request = message.request
        if request.request_id in self._assignments or request.request_id in self._settled:
            self._send(address, Accepted(request.request_id))
            return
        views = [view for view in self._views.values() if view.is_available]
        if not views:
            self._send(address, Rejected(request.request_id, 503, self._why_unavailable(), "unavailable"))
            return
        placement = place(request, views)
        if placement is None:
            self._send(address, self._too_large(request))
            return
        self._send(address, Accepted(request.request_id))
        self._dispatch(message.frontend, address, request, placement)

    def _dispatch(self, frontend: str, address: str, request: Request, placement: Placement) -> None:
        prefill = placement.prefill
        decode_names = [view.name for view in placement.decode]
        names = [prefill.name, *decode_names]
        self._assignments[request.request_id] = Assignment(frontend, request, names, prefill.name)
        if placement.decode:
            first = placement.decode[0]
            first.expected[request.request_id] = first.num_blocks_for(len(request.prompt_ids) + 1)
        dispatch = Dispatch(prefill.dispatched(request), request, 0, address, decode_names)
        self._send(prefill.peer.address, dispatch)

    def _why_unavailable(self) -> str:
        if any(view.is_in_service for view in self._views.values()):
            return "every instance is stalled"
        return "every instance is down" if self._was_complete else "no instance is ready"

    def _too_large(self, request: Request) -> Rejected:
        most = max(view.max_choices for view in self._views.values())
        if request.sampling.n > most:
            text = f"n ({request.sampling.n}) is more than the {most} choices that an instance decodes at once"
            return Rejected(request.request_id, 400, text, "too_many_choices", "n")
        room = max(view.peer.pool.num_blocks * view.block_size for view in self._views.values())
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

    # --- instances -------------------------------------------------------------------------------------------------

    def _on_register(self, message: Register) -> None:
        name = message.peer.instance
        if name in self._dead:
            return  # the news of its end came first
        if (reason := mismatch(message, self._epoch, self._model, self._views.values(), self._backend)) is not None:
            self._send(message.peer.address, RegistrationRefused(reason))
            return
        self._model = message.model
        load = InstanceLoad(free_blocks=message.peer.pool.num_blocks)
        newcomer = InstanceView(message.peer, message.role, message.block_size, message.max_choices, load)
        for view in self._views.values():
            self._send(view.peer.address, PeerUp(message.peer))
            self._send(message.peer.address, PeerUp(view.peer))
        self._views[name] = newcomer
        self._admit(newcomer)

    def _admit_newcomers(self) -> None:
        for newcomer in [view for view in self._views.values() if not view.is_in_service]:
            self._admit(newcomer)

    def _admit(self, newcomer: InstanceView) -> None:
        """Into service with the links that it needs: the first request must not wait for a connection.

        Those to a stalled instance come up when it is back.
        """
        others = [view for view in self._views.values() if view.is_available]
        if not all(newcomer.is_linked_to(view) and view.is_linked_to(newcomer) for view in others):
            return
        newcomer.is_in_service = True
        self._was_complete = self._was_complete or len(others) + 1 >= self._num_instances
        self._send(newcomer.peer.address, Registered())
        self._broadcast_status()

    def _on_load_report(self, message: LoadReport) -> None:
        if (view := self._views.get(message.instance)) is None:
            return  # it died; what it held is settled
        was_stalled = view.liveness.is_stalled
        view.apply(message)
        if was_stalled:
            self._broadcast_status()
        self._admit_newcomers()
        for request_id, owner in message.handed_over:
            self._on_handed_over(request_id, owner)
        for request_id in message.finished:
            self._settle(request_id)
        self._settle_unanswered(view)

    def _on_handed_over(self, request_id: str, owner: str) -> None:
        if (assignment := self._assignments.get(request_id)) is None:
            return
        assignment.owner = owner
        self._forget_expected(request_id)
        if owner in self._dead:
            self._fail(request_id, f"instance {owner} died while it held this request", "instance_died")
        elif self._is_stalled(owner):
            self._fail_stalled(request_id, owner)

    def _on_exited(self, message: InstanceExited) -> None:
        """What it held ends with an error; everyone forgets it."""
        self._dead.add(message.instance)
        if (gone := self._views.pop(message.instance, None)) is None:
            return
        self.gone_addresses.append(gone.peer.address)
        for view in self._views.values():
            self._send(view.peer.address, PeerDown(message.instance))
        for request_id in [r for r, a in self._assignments.items() if a.owner == message.instance]:
            self._fail(request_id, f"instance {message.instance} died while it held this request", "instance_died")
        self._admit_newcomers()
        self._broadcast_status()

    def _on_stalled(self, name: str) -> None:
        """Nothing has been heard of it for too long: what it holds ends, and nothing more goes there until it is back.

        The `Abort`s wait for it behind what was sent before, so that it runs nothing of this when it wakes.
        """
        for request_id in [r for r, a in self._assignments.items() if a.owner == name]:
            self._fail_stalled(request_id, name)
        self._admit_newcomers()
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
        if self._assignments.pop(request_id, None) is None:
            return
        self._settled[request_id] = None
        if len(self._settled) > _MAX_SETTLED:
            del self._settled[next(iter(self._settled))]
        self._forget_expected(request_id)

    def _forget_expected(self, request_id: str) -> None:
        for view in self._views.values():
            view.expected.pop(request_id, None)

    # --- status ----------------------------------------------------------------------------------------------------

    def _status(self) -> ClusterStatus:
        room = max((view.peer.pool.num_blocks * view.block_size for view in self._views.values()), default=0)
        if self._model is not None:
            room = min(room, self._model.max_model_tokens)
        statuses = [view.status() for view in self._views.values()]
        is_ready = self._was_complete and any(view.is_available for view in self._views.values())
        return ClusterStatus(is_ready, self._model, room, statuses)

    def _broadcast_status(self) -> None:
        for address in self._frontends.values():
            self._send(address, self._status())

    def _send(self, address: str, message: Message) -> None:
        self._out.append((address, message))
