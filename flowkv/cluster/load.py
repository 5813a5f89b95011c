"""The controller's picture of one instance: what it last reported, and what was sent to it since."""

from collections import deque
from dataclasses import dataclass, field

from flowkv.cluster.liveness import Liveness
from flowkv.cost import StepCost
from flowkv.messages import LoadReport, PeerInfo
from flowkv.types import InstanceCounters, InstanceLoad, InstanceStatus, LinkStatus, Request, Role

_FIRST_PREFILL_S = 6.0  # a guess that is generous, since nothing is known: code may have to be compiled


@dataclass(slots=True)
class InstanceView:
    """Reports are always a little old. A dispatch counts from the moment it is sent until a report echoes it.

    Requests that are being prefilled elsewhere for this instance count too, or every prefill instance would
    send its request to the same idle decode instance.
    """

    peer: PeerInfo
    role: Role
    block_size: int
    max_choices: int
    load: InstanceLoad
    counters: InstanceCounters = field(default_factory=InstanceCounters)
    links: list[LinkStatus] = field(default_factory=list)
    is_in_service: bool = False  # it and every other instance in service can write to each other
    liveness: Liveness = field(default_factory=Liveness)
    cost: StepCost = field(default_factory=StepCost)
    max_step_tokens: int = 0  # most prompt tokens of one step so far
    next_sequence: int = 1
    unseen: deque[tuple[int, int]] = field(default_factory=deque)  # (sequence, prompt tokens) not echoed yet
    expected: dict[str, int] = field(default_factory=dict)  # blocks of requests on their way here, by request
    unanswered: dict[tuple[str, str], float] = field(default_factory=dict)  # as it reports them: seconds since

    @property
    def name(self) -> str:
        return self.peer.instance

    @property
    def is_available(self) -> bool:
        return self.is_in_service and not self.liveness.is_stalled

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to be computed before a new request's."""
        return self.load.waiting_tokens + sum(tokens for _, tokens in self.unseen)

    @property
    def num_choices(self) -> int:
        """Choices that decode here, or soon will."""
        return self.load.num_decoding + len(self.expected)

    @property
    def num_free_blocks(self) -> int:
        """What is left when everything on its way has arrived; may be negative."""
        return self.load.free_blocks - sum(self.expected.values())

    def is_linked_to(self, peer: "InstanceView") -> bool:
        return any(link.peer == peer.name for link in self.links)

    def can_hold(self, request: Request) -> bool:
        fits = self.num_blocks_for(request.max_total_tokens) <= self.peer.pool.num_blocks
        return fits and request.sampling.n <= self.max_choices

    def predicted_ttft_s(self, request: Request) -> float:
        """Queue, then the prompt itself, then one step."""
        return self.cost.prefill_s(self.queued_tokens + len(request.prompt_ids)) + self.cost.decode_step_s

    @property
    def predicted_step_s(self) -> float:
        """The longest step that it may be in now."""
        if self.queued_tokens and not self.max_step_tokens:
            return _FIRST_PREFILL_S
        return self.cost.decode_step_s + self.cost.prefill_s(min(self.queued_tokens, self.max_step_tokens))

    def dispatched(self, request: Request) -> int:
        """Count a request that is being sent here to be prefilled; its dispatch sequence number."""
        sequence, self.next_sequence = self.next_sequence, self.next_sequence + 1
        self.unseen.append((sequence, len(request.prompt_ids)))
        return sequence

    def apply(self, report: LoadReport) -> None:
        self.load, self.counters, self.links = report.load, report.counters, report.links
        while self.unseen and self.unseen[0][0] <= report.sequence:
            self.unseen.popleft()
        for step in report.steps:
            self.cost.learn(step.prefill_tokens, step.decode_choices, step.seconds)
            self.max_step_tokens = max(self.max_step_tokens, step.prefill_tokens)
        self.liveness.heard()
        self.unanswered = {key: self.unanswered.get(key, 0.0) for key in report.unanswered}

    def pass_time(self, elapsed_s: float, timeout_s: float) -> bool:
        """True if it becomes stalled now: silent for `timeout_s`, or longer where its steps are long."""
        for key in self.unanswered:
            self.unanswered[key] += elapsed_s
        return self.liveness.pass_time(elapsed_s, timeout_s, self.predicted_step_s)

    def status(self) -> InstanceStatus:
        return InstanceStatus(
            name=self.name,
            role=self.role,
            num_blocks=self.peer.pool.num_blocks,
            block_size=self.block_size,
            load=self.load,
            counters=self.counters,
            links=self.links,
            is_stalled=self.liveness.is_stalled,
        )
