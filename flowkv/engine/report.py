"""What an instance tells the controller of itself, and when."""

from collections.abc import Callable
from typing import NamedTuple

from flowkv.engine.batch import Batch, BatchResult
from flowkv.engine.effects import Send
from flowkv.engine.transfers import TransferCounters
from flowkv.messages import LoadReport, StepSample
from flowkv.types import InstanceCounters, InstanceLoad, LinkStatus

_BUSY_INTERVAL_S = 0.02
_IDLE_INTERVAL_S = 1.0


class State(NamedTuple):
    """What a report says of the moment when it is made; fields as in `LoadReport`."""

    load: InstanceLoad
    counters: InstanceCounters
    links: list[LinkStatus]
    unanswered: list[tuple[str, str]]


class Reporter:
    """Collects steps and finished requests; a report goes out at once when a request ends, else at a beat."""

    def __init__(self, name: str, controller_address: str) -> None:
        self._name = name
        self._address = controller_address
        self._last_report_s = float("-inf")
        self._steps: list[StepSample] = []
        self._reported_sequence = 0
        self.dispatch_sequence = 0  # of the last Dispatch that was handled
        self.is_due = False  # something has happened that should be known at once
        self.finished: list[str] = []
        self.handed_over: list[tuple[str, str]] = []
        self.num_moved_blocks = 0
        self._num_steps = self._prefill_tokens = self._decode_tokens = 0
        self._step_seconds = self._forward_seconds = self._sampling_seconds = 0.0

    def add_step(self, batch: Batch, result: BatchResult, seconds: float) -> None:
        num_decodes = sum(item.num_tokens == 1 and item.start >= item.sequence.num_prompt for item in batch.items)
        num_prefill_tokens = batch.num_tokens - num_decodes
        context_tokens = sum(item.stop for item in batch.items)
        self._steps.append(StepSample(num_prefill_tokens, num_decodes, context_tokens, seconds))
        self._num_steps += 1
        self._prefill_tokens += num_prefill_tokens
        self._decode_tokens += num_decodes
        self._step_seconds += seconds
        self._forward_seconds += result.forward_seconds
        self._sampling_seconds += result.sampling_seconds

    def counters(self, transfers: TransferCounters, num_preemptions: int, num_expired_leases: int) -> InstanceCounters:
        return InstanceCounters(
            num_steps=self._num_steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            num_preemptions=num_preemptions,
            step_seconds=self._step_seconds,
            forward_seconds=self._forward_seconds,
            sampling_seconds=self._sampling_seconds,
            transfer_bytes=transfers.num_bytes,
            transfer_calls=transfers.num_calls,
            transfer_seconds=transfers.seconds,
            transfer_exposed_seconds=transfers.exposed_seconds,
            num_transfers=transfers.num_transfers,
            num_local_fallbacks=transfers.num_fallbacks,
            num_moved_blocks=self.num_moved_blocks,
            num_expired_leases=num_expired_leases,
        )

    def report(
        self,
        now_s: float,
        state: Callable[[], State],
    ) -> Send | None:
        """The report that is due now, if any; `state` is asked for only then."""
        if not self._is_due_at(now_s):
            return None
        now = state()
        report = LoadReport(
            self._name,
            self.dispatch_sequence,
            now.load,
            now.counters,
            self._steps,
            self.finished,
            self.handed_over,
            now.links,
            now.unanswered,
        )
        self.is_due = False
        self._last_report_s = now_s
        self._reported_sequence = self.dispatch_sequence
        self._steps, self.finished, self.handed_over = [], [], []
        return Send(self._address, report)

    def _is_due_at(self, now_s: float) -> bool:
        since_s = now_s - self._last_report_s
        if self.is_due or self.finished or self.handed_over or since_s >= _IDLE_INTERVAL_S:
            return True
        return since_s >= _BUSY_INTERVAL_S and bool(self._steps or self.dispatch_sequence != self._reported_sequence)
