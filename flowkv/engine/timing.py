"""When a request reached each stage on one instance, and what is told of that with its first and last output."""

from dataclasses import dataclass

from flowkv.types import Timings


@dataclass(slots=True)
class Stamps:
    """Seconds of this instance's clock; None for a stage that is not reached, or was on another instance.

    A sequence that is preempted keeps what it has: the time until it goes on is part of the stage that it was in.
    """

    queued_s: float | None = None  # its prompt is to be computed here
    started_s: float | None = None  # the step with its first chunk began
    reserved_s: float | None = None  # a peer is to fill blocks here
    filling_s: float | None = None  # the first of them came, or the word that all are on their way
    ready_s: float | None = None  # all of its KV is here
    decoding_s: float | None = None  # its first step of decoding began

    def start(self, now_s: float) -> None:
        if self.started_s is None:
            self.started_s = now_s

    def fill(self, now_s: float) -> None:
        if self.filling_s is None:
            self.filling_s = now_s

    def computed(self, now_s: float) -> Timings:
        """With what came of a prompt, or of a choice that was preempted: not the first of it."""
        if self.ready_s is not None:
            return self.last_decoded(now_s)
        self.ready_s = now_s
        return Timings(queued_s=_between(self.queued_s, self.started_s), prefill_s=_between(self.started_s, now_s))

    def first_decoded(self, began_s: float, now_s: float) -> Timings:
        """With the first output of a choice that decodes here; the step that gave it began at `began_s`."""
        self.decoding_s = began_s
        return Timings(
            reserved_s=_between(self.reserved_s, self.filling_s),
            transfer_s=_between(self.filling_s, self.ready_s),
            waiting_s=_between(self.ready_s, began_s),
            decode_s=now_s - began_s,
        )

    def last_decoded(self, now_s: float) -> Timings:
        return Timings(decode_s=_between(self.decoding_s, now_s))


def _between(one_s: float | None, other_s: float | None) -> float:
    return 0.0 if one_s is None or other_s is None else other_s - one_s
