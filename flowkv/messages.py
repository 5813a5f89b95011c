"""Every message between processes, grouped by who receives it.

Structs are frozen, tagged and positional on the wire (`flowkv.wire` encodes them). Delivery between two processes
is in order; between three there is no order, and no handler may assume one.

Addresses are ZeroMQ endpoints. Names of instances are unique over the life of a cluster: one that is started
again gets a new epoch in its name, so that a late message can never reach its successor.
"""

from typing import Annotated

import msgspec

from flowkv.config import ClusterConfig
from flowkv.types import (
    Count,
    InstanceCounters,
    InstanceLoad,
    InstanceStatus,
    LinkStatus,
    ModelInfo,
    Output,
    OutputIds,
    PoolDescriptor,
    ProcessUsage,
    Regime,
    Request,
    Role,
    RollingRestart,
    Seconds,
    Size,
)

RESTART_MARK = "~"  # in the name of an instance that takes the place of one that ended: decode-0, then decode-0~1


def seat_of(process: str) -> str:
    """What a process and those that take its place have in common: `decode-0@node-1` of `decode-0@node-1~2`."""
    return process.partition(RESTART_MARK)[0]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# --- to the controller ---------------------------------------------------------------------------------------------


class FrontendExited(Message):
    """A frontend's process is gone: nobody reads its requests any more. From the launcher; the controller tells every
    instance, when it has aborted them, with the `address` of the mailbox that is no more."""

    frontend: str
    address: str = ""


class FrontendHello(Message):
    """A frontend is listening at `address`; answered by `ClusterStatus`, now and whenever it changes."""

    frontend: str
    address: str


class Submit(Message):
    """Run a request. Repeated until `Accepted` or `Rejected` comes back; a repetition changes nothing.

    One that `resumes` an attempt that was lost (its id) goes on after `output_ids`; empty, it begins anew. It was
    accepted before, so it is not turned away for want of an instance that lives: it is repeated until there is one.
    One that is a claim may run somewhere already: the controller that had accepted it is gone, or nothing was heard of
    it for long. If it does not, `Lost` comes back. What was sent to another `controller` (`ClusterStatus`) is ignored:
    its frontend will claim it.
    """

    frontend: str
    request: Request
    output_ids: OutputIds = {}
    resumes: str | None = None
    is_claim: bool = False
    controller: str = ""


class Abort(Message):
    """Stop a request (all of its choices where `choice` is None). Unknown ids are ignored. Also sent to instances."""

    request_id: str
    choice: int | None = None


class PeerInfo(Message):
    """Where an instance is reached, and the facts that two instances must share before KV may pass between them."""

    instance: str
    address: str  # mailbox
    pool: PoolDescriptor


class Register(Message):
    """An instance is ready for work; answered by `Registered` or `RegistrationRefused`."""

    peer: PeerInfo
    role: Role
    model: ModelInfo
    block_size: Size
    max_choices: Size  # decoded at once
    version: str  # of FlowKV
    epoch: str  # of the cluster: from the controller that this instance was started for
    max_batch_tokens: Size = 512  # prompt tokens computed in one step, at most
    # When it has served before, and introduces itself to a controller that was started again:
    sequence: int = 0  # of the last Dispatch that it took
    running: list[str] = []  # requests that it answers for
    sending: list[str] = []  # requests that it answers for until a peer has taken them over
    is_draining: bool = False  # it was told to end


class StepSample(Message):
    """What `num_steps` consecutive steps did together and how long they took; the controller's cost model learns from
    these. Steps with prefill come one by one; steps that only decode, with the same choices in each, come as their sum.

    `prefill_pairs` counts pairs of a prompt token and a position that it attends to: `n` tokens from position `start`
    on make `n * start + n * (n + 1) / 2`.
    """

    prefill_tokens: Count
    prefill_pairs: Count
    decode_choices: Count
    decode_context_tokens: Count  # KV slots read by decodes
    seconds: Seconds
    num_steps: Annotated[int, msgspec.Meta(ge=1)] = 1


class LoadReport(Message):
    """Sent at once when a request came, moved or ended, and otherwise at a slow beat."""

    instance: str
    sequence: int  # of the last Dispatch that is counted in `load`
    role: Role  # by which the last step was put together: the proof that a `SetRole` took effect
    load: InstanceLoad
    counters: InstanceCounters
    steps: list[StepSample]
    finished: list[tuple[str, int]]  # requests that this instance answered to the end, with their output tokens
    handed_over: list[tuple[str, str]] = []  # (request id, instance that now owns it)
    returned: list[str] = []  # requests not begun that this instance gives back to be placed again
    links: list[LinkStatus] = []  # those that came up or moved something since the last report
    unanswered: list[tuple[str, str]] = []  # (request id, instance that may own it but has been silent for a lease)
    is_drained: bool = False  # after `Drain`: nothing is left here
    prefilled: list[str] = []  # requests whose first token has come since the last report
    address: str = ""  # mailbox of the instance: a controller that does not know it says `Introduce`


class InstanceExited(Message):
    """From the launcher: the process is gone. One of another `epoch` of the cluster may have had the same name."""

    instance: str
    reason: str
    epoch: str = ""
    is_final: bool = False  # nobody takes its place


class Join(Message):
    """Another node wants to run instances. Repeated until `Welcome` or `Dismissed`.

    Of all launchers, dead or alive, only one at a time can hold a `place`, and it holds it until its last process has
    ended: whoever held it before is dead, with all of its instances.
    """

    launcher: str  # unique over all launchers
    place: str
    address: str  # mailbox of the launcher
    version: str  # of FlowKV
    node: str = ""  # the name that an earlier controller of the cluster gave it


class TurnedAway(Message):
    """At the mailbox of a process, since it last said so: connections that do not hold the cluster's key, and messages
    that make no sense."""

    process: str
    num_connections: int
    num_messages: int


class Usage(Message):
    """What a process takes, once a second."""

    process: str
    usage: ProcessUsage


class NodeBeat(Message):
    """A joined node lives; answered by `ControllerBeat`, by `Introduce` from a controller that is new, or by
    `Dismissed` where it does not belong."""

    launcher: str
    address: str
    epoch: str  # of the cluster that it joined


class LeaveSoon(Message):
    """A joined node wants to go: its instances are to be drained, and ended (`StopInstance`)."""

    launcher: str


class RestartInstances(Message):
    """An operator wants these restarted, one after another, without losing anything. `token` names the wish."""

    instances: list[str]
    token: str


class FlipInstance(Message):
    """An operator wants this instance to take this role."""

    instance: str
    role: Role


class Leave(Message):
    """A joined node has ended all of its instances and goes."""

    launcher: str


# --- to an instance ------------------------------------------------------------------------------------------------


class Dispatch(Message):
    """Prefill this request, then hand it to the first of `decode_instances` that has room.

    An empty list means: decode it here. Outputs go straight to `frontend_address`. A request that goes on after
    `output_ids` is computed up to there, and decoded here.
    """

    sequence: int
    request: Request
    frontend_address: str
    decode_instances: list[str]
    output_ids: OutputIds = {}


class SetRole(Message):
    """Take this role from the next step on. What runs goes on; prompts not begun may be given back (`returned`)."""

    role: Role


class Drain(Message):
    """Give back what has not begun, finish the rest, and say so (`LoadReport.is_drained`): the instance is to end."""


class Registered(Message):
    """The instance is in service: it is known, and it and every other instance can write to each other."""


class RegistrationRefused(Message):
    """The instance does not belong here, and why, in one line for the user."""

    reason: str


class Introduce(Message):
    """The controller was started again and does not know the receiver: it is to register once more, or, being the
    launcher of a node, to join."""


class PeerUp(Message):
    peer: PeerInfo


class PeerDown(Message):
    """The process behind the name is dead and begins no write any more; a network may still carry what it had begun."""

    instance: str


# --- between instances: the handoff (DESIGN: life of a request, steps 4 and 5) -----------------------------------
# `source` is the prefill instance and `attempt` numbers its reservations, over all requests; the two name one transfer.
# Any of these may be lost, doubled or late (a connection that broke): what needs an answer is repeated until there is
# one, and every answer can be given again.


class Reserve(Message):
    """P asks D for blocks for the KV of all prompt tokens. Repeated until `Reserved` or `Refused`.

    No attempt of P's below `oldest_attempt` is open: D need not remember what became of them. P may be silent for
    `lease_s`, or for D's own lease if that is longer, before D takes the blocks back.
    """

    source: str
    attempt: int
    request: Request
    frontend_address: str
    oldest_attempt: int = 0
    lease_s: float = 0.0


class Reserved(Message):
    """D's blocks, in order; P may now write into them. `immediate` goes with every write, and D counts it."""

    instance: str
    request_id: str
    attempt: int
    immediate: int
    block_ids: list[int]


class Refused(Message):
    """D has no room."""

    instance: str
    request_id: str
    attempt: int


class KvReady(Message):
    """P has posted every write; ownership of the request passes once D has counted `num_blocks` blocks.

    Repeated until `Release` or `Cancel`: from here on P may not go elsewhere without D's word, or its death.
    `output_ids` maps a choice that still runs to what it has put out so far.
    """

    source: str
    request_id: str
    attempt: int
    num_blocks: int
    output_ids: OutputIds


class Renew(Message):
    """P lives and still wants these reservations: the lease of each begins anew. Answered by `Renewed`.

    One that is not named (P has given it up, or nothing more will be written for it) runs out.
    """

    source: str
    attempts: list[int]
    lease_s: float = 0.0  # as in `Reserve`


class Renewed(Message):
    """D lives. Until it has been silent for `lease_s`, or for P's own lease if that is longer, P waits for it."""

    instance: str
    lease_s: float = 0.0


class Release(Message):
    """D owns the request: P's blocks are free."""

    instance: str
    request_id: str
    attempt: int


class Cancel(Message):
    """D takes a reservation back. Repeated until `CancelAck` or P's death: its blocks stay untouched so long."""

    instance: str
    request_id: str
    attempt: int


class CancelAck(Message):
    """P will never write for this transfer again: posted writes have drained. Sent unasked when P gives up first."""

    source: str
    request_id: str
    attempt: int


# --- to a frontend -------------------------------------------------------------------------------------------------


class Accepted(Message):
    request_id: str


class Rejected(Message):
    """The request cannot be run; fields as in `errors.RequestError`."""

    request_id: str
    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None  # when there may be room again


class Lost(Message):
    """The instance that answered for an attempt is gone, or stalled, and the request has to go on elsewhere.

    The frontend knows what has come of it: answered by a `Submit` that resumes it, or by `Abort` where nobody waits for
    it any more. Repeated until then. `died`: it may be the request itself that the instance died of.
    """

    request_id: str
    died: bool = False


class Outputs(Message):
    """All that one step of one instance has for this frontend."""

    instance: str
    outputs: list[Output]


class ClusterStatus(Message):
    """The cluster as it is now: `model` is None until an instance has registered, `ready` False until all have."""

    ready: bool
    model: ModelInfo | None
    max_request_tokens: int  # the most that one request may hold: context length or largest pool
    instances: list[InstanceStatus]
    regime: Regime = Regime.NORMAL
    num_flips: int = 0  # of roles, by the controller
    num_refused: int = 0  # requests that admission turned away
    num_lost: int = 0  # attempts that ended with their instance
    controller: str = ""  # which one says so: another name means that it was started again, and knows no request
    rolling: RollingRestart = RollingRestart()
    turned_away: dict[str, tuple[int, int]] = {}  # at whose mailbox: connections, messages (`TurnedAway`)
    processes: dict[str, ProcessUsage] = {}  # by place


# --- to the launcher -----------------------------------------------------------------------------------------------


class Progress(Message):
    """What a starting process is doing; `fraction` in [0, 1]."""

    process: str
    fraction: float
    text: str


class Ready(Message):
    """A process serves: an instance has registered, the frontend listens (at `url`)."""

    process: str
    url: str = ""


class Serving(Message):
    """The frontend has heard that the cluster is ready: it takes requests."""

    process: str


class StartFailed(Message):
    """A process cannot start, and why, in one line for the user."""

    process: str
    reason: str


class Note(Message):
    """Something for the user to see."""

    text: str


class ServiceBeat(Message):
    """A controller or a frontend lives: once a second."""

    process: str


class Working(Message):
    """An instance has computed its first step for a request."""

    process: str


class DrainCluster(Message):
    """An operator wants the cluster to finish what it has and end, as by a signal."""


class StartInstance(Message):
    """The controller wants one instance more, of this role. It registers like any other."""

    role: Role


class StopInstance(Message):
    """This instance holds nothing any more: end it, and do not start another. Answered by `InstanceExited`."""

    instance: str


class RestartInstance(Message):
    """End this instance and start another in its place: in order, or by force where it hangs."""

    instance: str
    hangs: bool = False


# --- to the launcher of a joined node ------------------------------------------------------------------------------


class Welcome(Message):
    """The node is part of the cluster: its name, and what its instances need to know.

    `config` is that of the cluster; only what differs between instances (memory, threads, the model's path) may differ.
    """

    node: str
    epoch: str
    config: ClusterConfig
    model_name: str


class ControllerBeat(Message):
    """The controller lives, and knows this node."""

    epoch: str


class Dismissed(Message):
    """The node is not, or no longer, part of the cluster, and why, in one line for the user."""

    reason: str


AnyMessage = (
    FrontendExited
    | FrontendHello
    | Submit
    | Abort
    | PeerInfo
    | Register
    | StepSample
    | LoadReport
    | InstanceExited
    | Join
    | TurnedAway
    | Usage
    | NodeBeat
    | LeaveSoon
    | RestartInstances
    | FlipInstance
    | Leave
    | Dispatch
    | SetRole
    | Drain
    | Registered
    | RegistrationRefused
    | Introduce
    | PeerUp
    | PeerDown
    | Reserve
    | Reserved
    | Refused
    | KvReady
    | Renew
    | Renewed
    | Release
    | Cancel
    | CancelAck
    | Accepted
    | Rejected
    | Lost
    | Outputs
    | ClusterStatus
    | Progress
    | Ready
    | Serving
    | StartFailed
    | Note
    | Working
    | ServiceBeat
    | DrainCluster
    | StartInstance
    | StopInstance
    | RestartInstance
    | Welcome
    | ControllerBeat
    | Dismissed
)
