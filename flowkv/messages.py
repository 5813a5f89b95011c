"""Every message between processes, grouped by who receives it.

Structs are frozen, tagged and positional on the wire (`flowkv.wire` encodes them). Delivery between two processes
is in order; between three there is no order, and no handler may assume one.

Addresses are ZeroMQ endpoints. Names of instances are unique over the life of a cluster: one that is started
again gets a new epoch in its name, so that a late message can never reach its successor.
"""

import msgspec

from flowkv.types import (
    InstanceCounters,
    InstanceLoad,
    InstanceStatus,
    LinkStatus,
    ModelInfo,
    Output,
    PoolDescriptor,
    Request,
    Role,
)


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# --- to the controller ---------------------------------------------------------------------------------------------


class FrontendHello(Message):
    """A frontend is listening at `address`; answered by `ClusterStatus`, now and whenever it changes."""

    frontend: str
    address: str


class Submit(Message):
    """Run a request. Repeated until `Accepted` or `Rejected` comes back; a repetition changes nothing."""

    frontend: str
    request: Request


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
    block_size: int
    max_choices: int  # decoded at once
    version: str  # of FlowKV
    epoch: str  # of the cluster: from the controller that this instance was started for


class StepSample(Message):
    """What one step did and how long it took; the controller's cost model learns from these."""

    prefill_tokens: int
    decode_choices: int
    context_tokens: int  # KV slots read, over all items
    seconds: float


class LoadReport(Message):
    """Sent after steps that changed something, and when idle at a slow beat."""

    instance: str
    sequence: int  # of the last Dispatch that is counted in `load`
    load: InstanceLoad
    counters: InstanceCounters
    steps: list[StepSample]
    finished: list[str]  # requests that this instance answered to the end
    handed_over: list[tuple[str, str]] = []  # (request id, instance that now owns it)
    links: list[LinkStatus] = []  # every link that is up


class InstanceExited(Message):
    """From the launcher: the process is gone."""

    instance: str
    reason: str


# --- to an instance ------------------------------------------------------------------------------------------------


class Dispatch(Message):
    """Prefill this request, then hand it to the first of `decode_instances` that has room.

    An empty list means: decode it here. Outputs go straight to `frontend_address`.
    """

    sequence: int
    request: Request
    attempt: int
    frontend_address: str
    decode_instances: list[str]


class Registered(Message):
    """The instance is in service: it is known, and it and every other instance can write to each other."""


class RegistrationRefused(Message):
    """The instance does not belong here, and why, in one line for the user."""

    reason: str


class PeerUp(Message):
    peer: PeerInfo


class PeerDown(Message):
    """The process behind the name is dead; it will never write into a pool again."""

    instance: str


# --- between instances: the handoff (DESIGN: life of a request, steps 4 and 5) -----------------------------------
# `source` is the prefill instance and `attempt` numbers its reservations, over all requests; the two name one transfer.
# The channel between two instances is in order, so an attempt that is not higher than the last one seen is an echo.


class Reserve(Message):
    """P asks D for blocks for the KV of all prompt tokens."""

    source: str
    attempt: int
    request: Request
    request_attempt: int
    frontend_address: str


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

    `output_ids` maps a choice that still runs to what it has put out so far.
    """

    source: str
    request_id: str
    attempt: int
    num_blocks: int
    output_ids: dict[int, list[int]]


class Renew(Message):
    """P lives: every reservation that it has here is still wanted (its lease begins anew)."""

    source: str


class Release(Message):
    """D owns the request: P's blocks are free."""

    instance: str
    request_id: str
    attempt: int


class Cancel(Message):
    """D takes a reservation back. Its blocks stay untouched until `CancelAck` or P's death."""

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


class StartFailed(Message):
    """A process cannot start, and why, in one line for the user."""

    process: str
    reason: str


AnyMessage = (
    FrontendHello
    | Submit
    | Abort
    | PeerInfo
    | Register
    | StepSample
    | LoadReport
    | InstanceExited
    | Dispatch
    | Registered
    | RegistrationRefused
    | PeerUp
    | PeerDown
    | Reserve
    | Reserved
    | Refused
    | KvReady
    | Renew
    | Release
    | Cancel
    | CancelAck
    | Accepted
    | Rejected
    | Outputs
    | ClusterStatus
    | Progress
    | Ready
    | StartFailed
)
