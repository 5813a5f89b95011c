"""From what each request saw to the figures of a run. Pure: the definitions are here and nowhere else.

TTFT: request sent to first text, s. ITL: gap between two events that bring text, s (an event is one token unless the
server held text back). TPOT: (end - first text) / (output tokens - 1), s, per request. Goodput: requests per second
within every bound of the SLO; a request that failed is within none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.report import summarize


@dataclass(slots=True)
class Record:
    """What one request saw; times in seconds on one monotonic clock."""

    sent_s: float = 0.0
    late_s: float = 0.0  # sent this long after it was due: the load generator's own fault
    event_s: list[float] = field(default_factory=list)  # arrival of each event that brought text
    finished_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.event_s[0] - self.sent_s if self.event_s else None

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of fewer than two tokens."""
        if not self.event_s or self.num_output_tokens < 2:
            return None
        return (self.event_s[-1] - self.event_s[0]) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.event_s)]


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in seconds; None bounds nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def holds(self, record: Record) -> bool:
        if record.error is not None or record.ttft_s is None:
            return False
        in_ttft = self.ttft_s is None or record.ttft_s <= self.ttft_s
        return in_ttft and (self.tpot_s is None or record.tpot_s is None or record.tpot_s <= self.tpot_s)


def figures(records: Sequence[Record], duration_s: float, slo: Slo) -> dict[str, Any]:
    """Every figure of one run (or of several runs together, whose durations are added up)."""
    answered = [record for record in records if record.error is None]
    output_tokens = sum(record.num_output_tokens for record in answered)
    num_good = sum(slo.holds(record) for record in records)
    return {
        "num_requests": len(records),
        "num_errors": len(records) - len(answered),
        "duration_s": duration_s,
        "prompt_tokens": sum(record.num_prompt_tokens for record in answered),
        "output_tokens": output_tokens,
        "requests_per_s": len(answered) / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "ttft_s": summarize([record.ttft_s for record in answered if record.ttft_s is not None]),
        "itl_s": summarize([gap for record in answered for gap in record.itl_s]),
        "tpot_s": summarize([record.tpot_s for record in answered if record.tpot_s is not None]),
        "tokens_per_event": output_tokens / max(1, sum(len(record.event_s) for record in answered)),
        "goodput_per_s": num_good / duration_s,
        "good_fraction": num_good / len(records) if records else 0.0,
        "max_late_s": max((record.late_s for record in records), default=0.0),
    }
