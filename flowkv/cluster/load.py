"""The controller's picture of one instance: what it last reported, and what was sent to it since."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flowkv.cluster.liveness import Liveness
from flowkv.config import prefill_budget, step_bound_s
from flowkv.cost import LearntCost, prefill_pairs
from flowkv.messages import LoadReport, Register, StepSample
from flowkv.types import InstanceCounters, InstanceLoad, InstanceStatus, LinkStatus, Request, Role

_FIRST_PREFILL_S = 6.0  # a guess that is generous, since nothing is known: code may have to be compiled
_SMOOTHING_S = 2.0  # how far back PREFILL_FRACTION looks
_POOL_FRACTION = 0.95  # of a pool that may be promised
_WRITE_S = 1e-7  # a token's KV to a peer, while no transfer was seen
_LEARN_ERROR = 0.02  # weight of one request
_MAX_ERROR = 3.0
_MISSED_S = 5.0  # reports that come so long after a dispatch, and do not know of it: a connection broke
_STEP_END_S = 1.0  # those at the end of a step are written before all that came during the step is read
_SHORT_S = 0.05  # TTFTs that are mostly messages and waiting for a step say nothing


@dataclass(frozen=True, slots=True)
class Home:
    """What a request will hold where it decodes, halfway through its output, and the choices that it decodes."""

    num_tokens: float
    num_choices: int


@dataclass(slots=True)
class Chunks:
    """How an instance computes prompts beside the decodes that it runs now."""

    token_s: float  # without what attention costs
    step_s: float


class Work(NamedTuple):
    """Prompts to be computed: tokens, and pairs of a token and a position that it attends to."""

    num_tokens: int
    num_pairs: int

    def plus(self, other: "Work") -> "Work":
        return Work(self.num_tokens + other.num_tokens, self.num_pairs + other.num_pairs)


class _Sent(NamedTuple):
    """A dispatch."""

    sequence: int
    request_id: str
    work: Work
    is_deferred: bool
    sent_s: float


class PredictionError:
    """How many times as long as predicted prompts take lately, over all instances of a role: if it were each one's own,
    an instance that was late once would get nothing more to show that it is not."""

    def __init__(self) -> None:
        self.factor = 1.0

    def learn(self, ratio: float) -> None:
        """One more was predicted with the present factor, and took `ratio` times as long."""
        right = min(_MAX_ERROR, max(1 / _MAX_ERROR, self.factor * ratio))
        self.factor += _LEARN_ERROR * (right - self.factor)


class InstanceView:
    """Reports are always a little old. A dispatch counts from the moment it is sent until a report echoes it.

    `homes` are the requests that decode here or are on their way: if they did not count, every prefill instance would
    send its request to the same idle decode instance.
    """

    def __init__(
        self, message: Register, max_itl_s: float | None, prior: LearntCost, errors: Mapping[Role, "PredictionError"]
    ) -> None:
        pool = message.peer.pool
        self.peer = message.peer
        self.role = message.role
        self.block_size = message.block_size
        self.max_choices = message.max_choices
        self.max_batch_tokens = message.max_batch_tokens
        self.pool_tokens = pool.num_blocks * message.block_size
        self.load = InstanceLoad(free_blocks=pool.num_blocks)
        self.counters = InstanceCounters()
        self.links: dict[str, LinkStatus] = {}  # by peer
        self.is_in_service = False  # it and every other instance in service can write to each other
        self.is_draining = False
        self.is_drained = False
        self.is_stopping = False  # its launcher was told
        self.num_flips = 0
        self.flipped_s = -math.inf
        self.wanted_role = message.role  # differs from `role` until a report proves the flip
        self.liveness = Liveness()
        self.cost = LearntCost(prior)
        self.homes: dict[str, Home] = {}
        self.unanswered: dict[tuple[str, str], float] = {}  # as it reports them: seconds since
        self._max_itl_s = max_itl_s
        self._max_step_tokens = 0  # most prompt tokens of one step so far
        self._next_sequence = message.sequence + 1
        self._unseen: deque[_Sent] = deque()  # not echoed yet
        self._missing_since_s: float | None = None  # when a report came that should have known of the first of these
        self.missed: list[str] = []  # requests that were sent here and did not come
        self._unseen_work = Work(0, 0)
        self._unseen_deferred = Work(0, 0)
        self.home_tokens = 0.0  # KV slots of `homes`, each halfway through its output
        self.home_choices = 0
        self._pairs_per_token = 0.0  # of chunks lately
        self._prefill_fraction = 0.0
        self._reported_s: float | None = None
        self._predicted: dict[str, tuple[float, float]] = {}  # by request: (when it was sent, TTFT)
        self._errors = errors

    @property
    def name(self) -> str:
        return self.peer.instance

    @property
    def is_available(self) -> bool:
        return self.is_in_service and not self.liveness.is_stalled and not self.is_draining

    @property
    def usable_tokens(self) -> float:
        """KV slots that may be promised."""
        return _POOL_FRACTION * self.pool_tokens

    @property
    def queued_tokens(self) -> int:
        """All prompt tokens to be computed."""
        return self.queue.num_tokens + self.deferred.num_tokens

    @property
    def queue(self) -> "Work":
        """Prompts to be computed before that of a new request."""
        return Work(self.load.waiting_tokens, self.load.waiting_pairs).plus(self._unseen_work)

    @property
    def deferred(self) -> "Work":
        """Prompts that let a new one pass."""
        return Work(self.load.deferred_tokens, self.load.deferred_pairs).plus(self._unseen_deferred)

    @property
    def has_unseen(self) -> bool:
        """Something was sent that no report has echoed yet."""
        return bool(self._unseen)

    @property
    def holds_nothing(self) -> bool:
        """It is drained, and nothing is on its way to it."""
        return self.is_drained and not self.has_unseen and not self.homes

    def is_linked_to(self, peer: "InstanceView") -> bool:
        return peer.name in self.links

    def can_hold(self, request: Request) -> bool:
        return request.max_total_tokens <= self.pool_tokens and request.sampling.n <= self.max_choices

    @property
    def predicted_step_s(self) -> float:
        """The longest step that it may be in now."""
        tokens = min(self.queued_tokens, self._max_step_tokens)
        if self.queued_tokens and not self._max_step_tokens:
            return _FIRST_PREFILL_S
        pairs = tokens * self._pairs_per_token
        return self.cost.step_s(tokens, pairs, max(1, self.load.num_decoding), self.load.decode_context_tokens)

    # --- what is sent and heard ------------------------------------------------------------------------------------

    def dispatched(self, request: Request, num_tokens: int, ttft_s: float, now_s: float) -> int:
        """Count a request of which so many tokens are to be prefilled here, and what was predicted for it; its dispatch
        sequence number."""
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        work = Work(num_tokens, prefill_pairs(0, num_tokens))
        self._unseen.append(_Sent(sequence, request.request_id, work, request.is_deferred, now_s))
        self._count_unseen(work, request.is_deferred)
        if not request.is_deferred and ttft_s > _SHORT_S:
            self._predicted[request.request_id] = (now_s, ttft_s)
        return sequence

    def _learn_error(self, request_id: str, now_s: float) -> None:
        """Its first token came: what does not last as long as predicted is believed to do so again."""
        if (predicted := self._predicted.pop(request_id, None)) is not None:
            since_s, ttft_s = predicted
            self._errors[self.wanted_role].learn((now_s - since_s) / ttft_s)

    def forget(self, request_id: str) -> None:
        """It is over, or goes elsewhere."""
        self._predicted.pop(request_id, None)

    def _forget_first_sent(self) -> str:
        sent = self._unseen.popleft()
        self._missing_since_s = None
        self._count_unseen(Work(-sent.work.num_tokens, -sent.work.num_pairs), sent.is_deferred)
        return sent.request_id

    def _look_for_missed(self, now_s: float) -> None:
        if not self._unseen or now_s - self._unseen[0].sent_s < _MISSED_S:
            return
        if self._missing_since_s is None:
            self._missing_since_s = now_s
        elif now_s - self._missing_since_s >= _STEP_END_S:
            self.missed.append(self._forget_first_sent())

    def _count_unseen(self, work: "Work", is_deferred: bool) -> None:
        if is_deferred:
            self._unseen_deferred = self._unseen_deferred.plus(work)
        else:
            self._unseen_work = self._unseen_work.plus(work)

    def add_home(self, request_id: str, home: Home) -> None:
        self.homes[request_id] = home
        self.home_tokens += home.num_tokens
        self.home_choices += home.num_choices

    def remove_home(self, request_id: str) -> None:
        if (home := self.homes.pop(request_id, None)) is not None:
            self.home_tokens -= home.num_tokens
            self.home_choices -= home.num_choices

    def apply(self, report: LoadReport, now_s: float) -> bool:
        """True if the report proves a flip that was asked for."""
        self.load, self.counters = report.load, report.counters
        for link in report.links:
            self.links[link.peer] = link
        while self._unseen and self._unseen[0].sequence <= report.sequence:
            self._forget_first_sent()
        self._look_for_missed(now_s)
        prefill_s = 0.0
        for step in report.steps:
            prefill_s += self._learn(step)
        elapsed_s = now_s - self._reported_s if self._reported_s is not None else 0.0
        if elapsed_s > 0:
            weight = 1 - math.exp(-elapsed_s / _SMOOTHING_S)
            self._prefill_fraction += weight * (min(1.0, prefill_s / elapsed_s) - self._prefill_fraction)
            self._reported_s = now_s
        elif self._reported_s is None:
            self._reported_s = now_s
        for request_id in report.prefilled:
            self._learn_error(request_id, now_s)
        self.liveness.heard()
        self.is_drained = report.is_drained
        self.unanswered = {key: self.unanswered.get(key, 0.0) for key in report.unanswered}
        has_flipped = report.role is not self.role
        self.role = report.role
        return has_flipped

    def _learn(self, step: StepSample) -> float:
        """Seconds spent in it, if it had a chunk."""
        self.cost.learn_step(step)
        if not step.prefill_tokens:
            return 0.0
        self._max_step_tokens = max(self._max_step_tokens, step.prefill_tokens)
        self._pairs_per_token += 0.1 * (step.prefill_pairs / step.prefill_tokens - self._pairs_per_token)
        return step.seconds

    def pass_time(self, elapsed_s: float, timeout_s: float) -> bool:
        """True if it becomes stalled now: silent for `timeout_s`, or longer where its steps are long."""
        for key in self.unanswered:
            self.unanswered[key] += elapsed_s
        step_s = self.predicted_step_s if self.liveness.silent_s + elapsed_s >= timeout_s else 0.0
        return self.liveness.pass_time(elapsed_s, timeout_s, step_s)

    # --- figures ---------------------------------------------------------------------------------------------------

    def prompt_s(self, num_tokens: int) -> float:
        """A whole prompt, alone on this instance."""
        c = self.cost.coefficients()
        num_steps = -(-num_tokens // self.max_batch_tokens)
        return num_steps * c.p0 + num_tokens * c.p1 + prefill_pairs(0, num_tokens) * c.p2

    def decode_capacity(self, target_s: float, mean_tokens: float) -> float:
        """Choices of `mean_tokens` KV slots each that it can decode in steps of `target_s`, at least one."""
        c = self.cost.coefficients()
        per_choice_s = c.d1 + c.d2 * mean_tokens
        by_time = (target_s - c.d0) / per_choice_s if per_choice_s > 0 else math.inf
        by_room = self.usable_tokens / max(1.0, mean_tokens)
        return max(1.0, min(by_time, by_room, self.max_choices))

    def row(self) -> tuple[float, ...]:
        """What `columns.Field` says, in that order."""
        c = self.cost.hopeful()
        load = self.load
        step_s = c.d0 + c.d1 * load.num_decoding + c.d2 * load.decode_context_tokens if load.num_decoding else 0.0
        chunks, error = self._chunks(), self._errors[self.wanted_role].factor
        return (
            self.is_available,
            self.wanted_role is Role.PREFILL,
            self.wanted_role is Role.DECODE,
            self.pool_tokens,
            self.max_choices,
            self.usable_tokens - self.home_tokens,
            error * (self.queue.num_tokens * chunks.token_s + self.queue.num_pairs * c.p2) + 0.5 * step_s,
            error * (self.deferred.num_tokens * chunks.token_s + self.deferred.num_pairs * c.p2),
            error * chunks.token_s,
            error * c.p2,
            load.num_decoding,
            step_s,
            max(step_s, chunks.step_s),
            self._prefill_fraction,
            self.home_choices,
            self.home_tokens,
            c.d0,
            c.d1,
            c.d2,
            self._write_s(),
        )

    def _chunks(self) -> Chunks:
        """As the engine sizes them: what fits within the ITL bound beside decodes, or the role's share.

        Beside the decodes halfway between those of now and those that are on their way.
        """
        c, load = self.cost.hopeful(), self.load
        choices = max(load.num_decoding, (load.num_decoding + self.home_choices) / 2)
        slots = max(load.decode_context_tokens, (load.decode_context_tokens + self.home_tokens) / 2)
        if self._max_itl_s is not None and (choices or self.wanted_role is not Role.PREFILL):
            bound_s = step_bound_s(self._max_itl_s, self.wanted_role)
            most = self.cost.max_prefill_tokens(bound_s, choices, slots, int(self._pairs_per_token))
            num_tokens = max(self.block_size, min(self.max_batch_tokens, most))
        else:
            num_tokens = prefill_budget(self.max_batch_tokens, self.block_size, self.wanted_role, choices)
        step_s = c.p0 + num_tokens * (c.p1 + c.p2 * self._pairs_per_token)
        if choices:
            step_s = max(c.d0, step_s) + c.d1 * choices + c.d2 * slots
        return Chunks(step_s / num_tokens - c.p2 * self._pairs_per_token, step_s)

    def _write_s(self) -> float:
        counters = self.counters
        if not counters.transfer_bytes:
            return _WRITE_S
        token_bytes = self.peer.pool.block_bytes / self.block_size
        return counters.transfer_seconds / counters.transfer_bytes * token_bytes

    def status(self) -> InstanceStatus:
        return InstanceStatus(
            name=self.name,
            role=self.role,
            num_blocks=self.peer.pool.num_blocks,
            block_size=self.block_size,
            load=self.load,
            counters=self.counters,
            links=list(self.links.values()),
            is_stalled=self.liveness.is_stalled,
            is_draining=self.is_draining,
            num_flips=self.num_flips,
        )
