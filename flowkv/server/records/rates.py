"""What an instance does in a second, from its totals at two moments."""

from dataclasses import dataclass

from flowkv.types import InstanceStatus


@dataclass(frozen=True, slots=True)
class Rates:
    """What one instance did between two looks."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    moved_bytes_per_s: float
    step_s: float | None  # None: it made no step

    @classmethod
    def between(cls, before: InstanceStatus, after: InstanceStatus, elapsed_s: float) -> "Rates":
        old, new = before.counters, after.counters
        num_steps = new.num_steps - old.num_steps
        return cls(
            (new.prefill_tokens - old.prefill_tokens) / elapsed_s,
            (new.decode_tokens - old.decode_tokens) / elapsed_s,
            (new.transfer_bytes - old.transfer_bytes) / elapsed_s,
            (new.step_seconds - old.step_seconds) / num_steps if num_steps else None,
        )
