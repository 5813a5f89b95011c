"""Whether an instance still says anything. What is silent but not known to be dead is *stalled*, and may come back."""

from dataclasses import dataclass

_MIN_STALL_S = 3.0  # an idle instance reports every second
_STALL_LEASES = 2
_STALL_STEPS = 10  # an instance says nothing during a step


def stall_timeout_s(lease_s: float) -> float:
    """Silence that no instance needs, but for the length of its steps."""
    return max(_MIN_STALL_S, _STALL_LEASES * lease_s)


@dataclass(slots=True)
class Liveness:
    """One instance's silence."""

    silent_s: float = 0.0
    is_stalled: bool = False

    def heard(self) -> None:
        self.silent_s = 0.0
        self.is_stalled = False

    def pass_time(self, elapsed_s: float, timeout_s: float, step_s: float) -> bool:
        """True if it becomes stalled now: silent for `timeout_s`, or for many steps of `step_s` if that is longer."""
        self.silent_s += elapsed_s
        was_stalled = self.is_stalled
        self.is_stalled = was_stalled or self.silent_s >= max(timeout_s, _STALL_STEPS * step_s)
        return self.is_stalled and not was_stalled
