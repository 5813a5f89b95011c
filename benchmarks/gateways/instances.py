"""Instances that answer at once, both in one process: no model, no KV, and our own messages.

A step is a turn of the loop: all that has come is prefilled, all that is under way puts out a token. As real ones do,
an instance sends a frontend one `Outputs` a step, and the controller one `LoadReport` where something came or ended.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field

import zmq

from flowkv import __version__
from flowkv.messages import (
    Abort,
    Dispatch,
    Introduce,
    LoadReport,
    Message,
    Outputs,
    PeerInfo,
    PeerUp,
    Register,
    SetRole,
    StepSample,
)
from flowkv.types import (
    FinishReason,
    InstanceCounters,
    InstanceLoad,
    LinkStatus,
    ModelInfo,
    Output,
    PoolDescriptor,
    Request,
    Role,
    Timings,
)
from flowkv.wire import Mailbox, Outbox, SyncContext

NUM_BLOCKS, BLOCK_SIZE = 200_000, 16
_BEAT_MS = 200
_STEP_S = 1e-3  # what a step is said to take
_TOKEN = 300


@dataclass(frozen=True, slots=True)
class InstancesSpec:
    folder: str
    controller_address: str
    epoch: str
    model: ModelInfo
    roles: tuple[Role, ...]


@dataclass(slots=True)
class _Running:
    request: Request
    frontend: str
    num_out: int = 1  # the prefill gives the first


@dataclass(slots=True)
class _Instance:
    name: str
    role: Role
    mailbox: Mailbox
    running: dict[str, _Running] = field(default_factory=dict)
    dispatched: list[Dispatch] = field(default_factory=list)
    sequence: int = 0
    links: list[LinkStatus] = field(default_factory=list)
    finished: list[tuple[str, int]] = field(default_factory=list)
    handed_over: list[tuple[str, str]] = field(default_factory=list)
    prefilled: list[str] = field(default_factory=list)
    steps: list[StepSample] = field(default_factory=list)
    report_due: bool = True


def run_instances(spec: InstancesSpec) -> None:
    """Until SystemExit."""
    context = SyncContext()
    outbox = Outbox(context)
    instances = _Instances(spec, context, outbox)
    try:
        while True:
            instances.turn()
    finally:
        instances.close()
        outbox.close()
        context.term()


class _Instances:
    def __init__(self, spec: InstancesSpec, context: SyncContext, outbox: Outbox) -> None:
        self._spec = spec
        self._outbox = outbox
        self._by_name: dict[str, _Instance] = {}
        self._poller = zmq.Poller()
        for number, role in enumerate(spec.roles):
            name = f"{role}-{number}"
            instance = _Instance(name, role, Mailbox(context, f"ipc://{spec.folder}/{name}"))
            self._by_name[name] = instance
            self._poller.register(instance.mailbox.socket, zmq.POLLIN)
            self._register(instance)
        self._reported_s = time.monotonic()

    def turn(self) -> None:
        is_busy = any(instance.running for instance in self._by_name.values())
        self._poller.poll(0 if is_busy else _BEAT_MS)
        outputs: defaultdict[tuple[str, str], list[Output]] = defaultdict(list)
        for instance in self._by_name.values():
            for message in instance.mailbox.receive_all():
                self._handle(instance, message)
            self._decode(instance, outputs)
            self._prefill(instance, outputs)
        for (name, frontend), some in outputs.items():
            self._outbox.send(frontend, Outputs(name, some))
        self._report()

    def close(self) -> None:
        for instance in self._by_name.values():
            instance.mailbox.close()

    def _handle(self, instance: _Instance, message: Message) -> None:
        match message:
            case Dispatch():
                instance.dispatched.append(message)
            case PeerUp():
                instance.links.append(LinkStatus(peer=message.peer.instance, backend="shm"))
                instance.report_due = True
            case SetRole():
                instance.role = message.role
                instance.report_due = True
            case Abort():
                instance.running.pop(message.request_id, None)
            case Introduce():
                self._register(instance)
            case _:
                pass

    def _register(self, instance: _Instance) -> None:
        pool = PoolDescriptor(
            node="here", layout_fingerprint="none", num_blocks=NUM_BLOCKS, block_bytes=1, endpoints={"shm": b""}
        )
        peer = PeerInfo(instance.name, instance.mailbox.address, pool)
        register = Register(
            peer, instance.role, self._spec.model, BLOCK_SIZE, 4096, __version__, self._spec.epoch, 65_536
        )
        self._outbox.send(self._spec.controller_address, register)

    def _prefill(self, instance: _Instance, outputs: "defaultdict[tuple[str, str], list[Output]]") -> None:
        for dispatch in instance.dispatched:
            request = dispatch.request
            is_last = request.sampling.max_tokens <= 1
            reason = FinishReason.LENGTH if is_last else None
            timings = Timings(queued_s=1e-6, prefill_s=_STEP_S)
            output = Output(request.request_id, 0, 0, [_TOKEN], reason, timings=timings)
            outputs[instance.name, dispatch.frontend_address].append(output)
            instance.sequence = dispatch.sequence
            instance.prefilled.append(request.request_id)
            taker = next((self._by_name[name] for name in dispatch.decode_instances), instance)
            if is_last:
                instance.finished.append((request.request_id, 1))
            else:
                taker.running[request.request_id] = _Running(request, dispatch.frontend_address)
                if taker is not instance:
                    instance.handed_over.append((request.request_id, taker.name))
        if instance.dispatched:
            num_tokens = sum(len(dispatch.request.prompt_ids) for dispatch in instance.dispatched)
            instance.steps.append(StepSample(num_tokens, 250 * num_tokens, 0, 0, _STEP_S))
            instance.dispatched.clear()
            instance.report_due = True

    def _decode(self, instance: _Instance, outputs: "defaultdict[tuple[str, str], list[Output]]") -> None:
        if not instance.running:
            return
        instance.steps.append(StepSample(0, 0, len(instance.running), 500 * len(instance.running), _STEP_S))
        for request_id, running in list(instance.running.items()):
            is_last = running.num_out + 1 >= running.request.sampling.max_tokens
            reason = FinishReason.LENGTH if is_last else None
            timings = Timings(transfer_s=1e-4, waiting_s=1e-6, decode_s=_STEP_S) if is_last else None
            output = Output(request_id, 0, running.num_out, [_TOKEN], reason, timings=timings)
            outputs[instance.name, running.frontend].append(output)
            running.num_out += 1
            if is_last:
                del instance.running[request_id]
                instance.finished.append((request_id, running.num_out))
                instance.report_due = True

    def _report(self) -> None:
        now_s = time.monotonic()
        is_beat = now_s - self._reported_s >= _BEAT_MS / 1000
        for instance in self._by_name.values():
            if instance.report_due or is_beat:
                self._outbox.send(self._spec.controller_address, _load_report(instance))
                instance.links, instance.steps = [], []
                instance.finished, instance.handed_over, instance.prefilled = [], [], []
                instance.report_due = False
        if is_beat:
            self._reported_s = now_s


def _load_report(instance: _Instance) -> LoadReport:
    num_decoding = len(instance.running)
    load = InstanceLoad(
        num_decoding=num_decoding, decode_context_tokens=500 * num_decoding, free_blocks=NUM_BLOCKS - 32 * num_decoding,
        used_blocks=32 * num_decoding,
    )  # fmt: skip
    return LoadReport(
        instance.name, instance.sequence, instance.role, load, InstanceCounters(), instance.steps, instance.finished,
        instance.handed_over, links=instance.links, prefilled=instance.prefilled, address=instance.mailbox.address,
    )  # fmt: skip
