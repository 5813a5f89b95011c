"""What an instance tells the controller of itself, and when."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flowkv.cost import LearntCost
from flowkv.engine.batch import Batch, BatchItem, BatchResult
from flowkv.engine.effects import Send
from flowkv.engine.steps import StepLog
from flowkv.engine.transfers import TransferCounters
from flowkv.messages import LoadReport
from flowkv.types import InstanceCounters, InstanceLoad, LinkStatus, Role

_BUSY_INTERVAL_S = 0.05
_SLOW_INTERVAL_S = 1.0


class State(NamedTuple):
    """What a report says of the moment when it is made; fields as in `LoadReport`."""

    role: Role
    load: InstanceLoad
    counters: InstanceCounters
    links: list[LinkStatus]
    unanswered: list[tuple[str, str]]
    is_drained: bool


class Reporter:
    """Collects what has happened. A report is due at once when a request has ended, moved or come back (or whenever
    `is_due` is set), after a busy interval when a request has come or prompts were computed, else at a slow beat."""

    def __init__(self, peer: tuple[str, str], controller_address: str, cost: LearntCost | None = None) -> None:
        """`peer`: name and mailbox of the instance."""
        self._name, self._own_address = peer
        self._address = controller_address
        self._steps = StepLog(cost)
        self._last_report_s = float("-inf")
        self.due_s = float("-inf")  # when the next one is due if nothing else happens
        self.is_due = False  # something has happened that should be known at once
        self.dispatch_sequence = 0  # of the last Dispatch that was handled
        self.num_moved_blocks = 0
        self._finished: list[tuple[str, int]] = []
        self._handed_over: list[tuple[str, str]] = []
        self._returned: list[str] = []
        self._prefilled: list[str] = []

    def dispatched(self, sequence: int) -> None:
        self.dispatch_sequence = sequence
        self._hurry()

    def finished(self, request_id: str, num_output_tokens: int) -> None:
        self._finished.append((request_id, num_output_tokens))
        self.is_due = True

    def handed_over(self, request_id: str, owner: str) -> None:
        self._handed_over.append((request_id, owner))
        self.is_due = True

    def returned(self, request_id: str) -> None:
        self._returned.append(request_id)
        self.is_due = True

    def add_steps(self, batch: Batch, result: BatchResult, step_seconds: Sequence[float]) -> None:
        if self._steps.add(batch, result, step_seconds):
            self._prefilled += [item.sequence.request.request_id for item in batch.items if _is_prompts_last(item)]
            self._hurry()

    def counters(self, transfers: TransferCounters, num_preemptions: int, num_expired_leases: int) -> InstanceCounters:
        steps = self._steps
        return InstanceCounters(
            num_steps=steps.num_steps,
            prefill_tokens=steps.prefill_tokens,
            decode_tokens=steps.decode_tokens,
            num_preemptions=num_preemptions,
            step_seconds=steps.seconds,
            forward_seconds=steps.forward_seconds,
            sampling_seconds=steps.sampling_seconds,
            transfer_bytes=transfers.num_bytes,
            transfer_calls=transfers.num_calls,
            transfer_seconds=transfers.seconds,
            transfer_exposed_seconds=transfers.exposed_seconds,
            num_transfers=transfers.num_transfers,
            num_local_fallbacks=transfers.num_fallbacks,
            num_moved_blocks=self.num_moved_blocks,
            num_expired_leases=num_expired_leases,
        )

    def report(self, now_s: float, state: Callable[[], State]) -> Send | None:
        """The report that is due now, if any; `state` is asked for only then."""
        if not self.is_due and now_s < self.due_s:
            return None
        now = state()
        report = LoadReport(
            self._name,
            self.dispatch_sequence,
            now.role,
            now.load,
            now.counters,
            self._steps.take(),
            self._finished,
            self._handed_over,
            self._returned,
            now.links,
            now.unanswered,
            now.is_drained,
            self._prefilled,
            self._own_address,
        )
        self.is_due = False
        self._last_report_s = now_s
        self.due_s = now_s + _SLOW_INTERVAL_S
        self._finished, self._handed_over, self._returned, self._prefilled = [], [], [], []
        return Send(self._address, report)

    def _hurry(self) -> None:
        self.due_s = min(self.due_s, self._last_report_s + _BUSY_INTERVAL_S)


def _is_prompts_last(item: BatchItem) -> bool:
    """Whether the first token came of it; preempted choices, which are computed again, end later."""
    return item.start < item.sequence.num_prompt == item.stop
