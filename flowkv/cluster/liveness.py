"""Whether an instance still says anything.

What is silent but not known to be dead is *stalled*, and may come back; what stays so for as long again
is taken to hang.
"""

import math
from dataclasses import dataclass

STALL_S = 5.0  # an idle instance reports every second
_STALL_STEPS = 10  # an instance says nothing during a step


@dataclass(slots=True)
class Liveness:
    """One instance's silence."""

    silent_s: float = 0.0
    is_stalled: bool = False
    _hangs_s: float = math.inf  # the silence at which it hangs, once more

    def heard(self) -> None:
        self.silent_s = 0.0
        self.is_stalled = False
        self._hangs_s = math.inf

    def pass_time(self, elapsed_s: float, timeout_s: float, step_s: float) -> bool:
        """True if it becomes stalled now: silent for `timeout_s`, or for many steps of `step_s` if that is longer."""
        self.silent_s += elapsed_s
        if self.is_stalled or self.silent_s < max(timeout_s, _STALL_STEPS * step_s):
            return False
        self.is_stalled = True
        self._hangs_s = 2 * self.silent_s
        return True

    def take_hang(self, timeout_s: float) -> bool:
        """True once when it has been stalled as long as it took to be called so, and then every `timeout_s`."""
        if self.silent_s < self._hangs_s:
            return False
        self._hangs_s = self.silent_s + timeout_s
        return True
