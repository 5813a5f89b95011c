"""One request's life, put together from what each process measured with its own clock.

The clocks of two processes are never compared. An instance says how long its stages were (`types.Timings`); the
frontend knows when it heard that, and lays the stages out backwards from there. What no process measured (messages,
and the rest of a step during which an instance does not read them) is left as a gap, and summed as `unaccounted_s`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from flowkv.errors import RequestError
from flowkv.types import FinishReason, Output, Request, Timings

FRONTEND = "frontend"


class PhaseName(StrEnum):
    """In the order of a request's life. `reserved` and `transfer` run beside the prefill."""

    TOKENIZE = "tokenize"  # reading the body, the chat template, tokens
    PLACE = "place"  # until the controller has said where it goes
    QUEUED = "queued"  # in the prefill instance's queue
    PREFILL = "prefill"
    RESERVED = "reserved"  # blocks are kept on the decode instance, and nothing has come yet
    TRANSFER = "transfer"  # until all of the KV has come
    WAITING = "waiting"  # for the next step of the decode instance
    DECODE = "decode"
    DETOKENIZE = "detokenize"  # of all tokens together; it lies within the decode, and is drawn at the end


class State(StrEnum):
    PLACING = "placing"
    PREFILLING = "prefilling"  # queued included
    DECODING = "decoding"
    FINISHED = "finished"
    REFUSED = "refused"  # the cluster did not take it
    FAILED = "failed"
    ABORTED = "aborted"


class Phase(msgspec.Struct, frozen=True):
    """`where` is who measured it, `start_s` is since the request's arrival."""

    name: PhaseName
    where: str
    start_s: float
    seconds: float
    attempt: int = 0


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What `/requests` shows. Seconds since arrival; None for what has not happened (yet)."""

    request_id: str
    key: str | None = None  # name of the API key
    traceparent: str | None = None  # of the client's span
    arrived_at: float  # Unix time, s
    state: State
    finish_reason: FinishReason | None = None  # of the choice that ended last
    status: int | None = None  # of HTTP, or 499 where the client went away
    error: str | None = None  # code of `errors.RequestError`
    prompt_tokens: int
    output_tokens: int  # of all choices
    num_choices: int
    num_attempts: int
    prefill_instance: str | None = None  # of the last attempt
    decode_instance: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None  # mean gap between the tokens of a choice
    e2el_s: float | None = None
    elapsed_s: float  # e2el_s, or until now
    unaccounted_s: float  # in no phase
    phases: list[Phase]

    @property
    def is_over(self) -> bool:
        return self.e2el_s is not None


@dataclass(slots=True)
class _Heard:
    """Timings of an instance, and when the frontend had them."""

    instance: str
    timings: Timings
    at_s: float


@dataclass(slots=True)
class _Attempt:
    submitted_s: float
    accepted_s: float | None = None
    prefill: _Heard | None = None
    first: _Heard | None = None  # of decoding
    decode_s: float = 0.0  # of the choice that took longest
    num_ended: int = 0  # choices whose instance has said how long they took


class Timeline:
    """Collects one request's moments; times are those of the frontend's clock, `arrived_at` is that of the world."""

    __slots__ = (
        "_arrival_s", "_arrived_at", "_attempts", "_detokenize_s", "_ended_s", "_error", "_finish_reason",
        "_first_token_s", "_key", "_num_tokens", "_request", "_state", "_status", "_traceparent",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        arrived_at: float,
        arrival_s: float,
        submitted_s: float,
        key: str | None = None,
        traceparent: str | None = None,
    ) -> None:
        """`key` is the name of the API key that it came with."""
        self._request = request
        self._key = key
        self._traceparent = traceparent
        self._arrived_at = arrived_at
        self._arrival_s = arrival_s
        self._attempts = [_Attempt(submitted_s)]
        self._state = State.PLACING
        self._finish_reason: FinishReason | None = None
        self._status: int | None = None
        self._error: str | None = None
        self._num_tokens = 0
        self._detokenize_s = 0.0
        self._first_token_s: float | None = None
        self._ended_s: float | None = None

    @property
    def is_over(self) -> bool:
        return self._ended_s is not None

    def resubmitted(self, now_s: float) -> None:
        """What held it is gone: a new attempt begins."""
        self._attempts.append(_Attempt(now_s))

    def accepted(self, now_s: float) -> None:
        attempt = self._attempts[-1]
        if attempt.accepted_s is None:
            attempt.accepted_s = now_s
        if self._state is State.PLACING:
            self._state = State.PREFILLING

    def heard(self, instance: str, output: Output, timings: Timings, now_s: float) -> None:
        """Timings come with the first output of a choice on an instance, and with its last."""
        attempt = self._attempts[-1]
        heard = _Heard(instance, timings, now_s)
        if timings.prefill_s and attempt.prefill is None:
            attempt.prefill = heard
        if timings.decode_s and attempt.first is None:
            attempt.first = heard
        attempt.decode_s = max(attempt.decode_s, timings.decode_s)
        attempt.num_ended += output.finish_reason is not None

    def put_out(self, num_tokens: int, detokenize_s: float, now_s: float) -> None:
        """So many tokens are on their way to the client."""
        self._num_tokens += num_tokens
        self._detokenize_s += detokenize_s
        if num_tokens and self._first_token_s is None:
            self._first_token_s = now_s
            self._state = State.DECODING

    def finished(self, reason: FinishReason, now_s: float) -> None:
        self._end(State.FINISHED, 200, now_s)
        self._finish_reason = reason

    def aborted(self, now_s: float) -> None:
        self._end(State.ABORTED, 499, now_s)
        self._finish_reason = FinishReason.ABORT

    def failed(self, error: RequestError, now_s: float) -> None:
        was_taken = self._attempts[0].accepted_s is not None
        self._end(State.FAILED if was_taken else State.REFUSED, error.status, now_s)
        self._error = error.code
        self._finish_reason = FinishReason.ERROR if was_taken else None

    def _end(self, state: State, status: int, now_s: float) -> None:
        self._state, self._status, self._ended_s = state, status, now_s

    def record(self, now_s: float) -> RequestRecord:
        elapsed_s = (now_s if self._ended_s is None else self._ended_s) - self._arrival_s
        phases = self._phases(elapsed_s)
        last = self._attempts[-1]
        ttft_s = None if self._first_token_s is None else self._first_token_s - self._arrival_s
        num_choices = self._request.sampling.n
        num_gaps = self._num_tokens // num_choices - 1
        return RequestRecord(
            request_id=self._request.request_id,
            key=self._key,
            traceparent=self._traceparent,
            arrived_at=self._arrived_at,
            state=self._state,
            finish_reason=self._finish_reason,
            status=self._status,
            error=self._error,
            prompt_tokens=len(self._request.prompt_ids),
            output_tokens=self._num_tokens,
            num_choices=num_choices,
            num_attempts=len(self._attempts),
            prefill_instance=None if last.prefill is None else last.prefill.instance,
            decode_instance=None if last.first is None else last.first.instance,
            ttft_s=ttft_s,
            tpot_s=(elapsed_s - ttft_s) / num_gaps if self.is_over and ttft_s is not None and num_gaps > 0 else None,
            e2el_s=elapsed_s if self.is_over else None,
            elapsed_s=elapsed_s,
            unaccounted_s=elapsed_s - _covered_s(phases, elapsed_s),
            phases=phases,
        )

    def _phases(self, elapsed_s: float) -> list[Phase]:
        first = self._attempts[0].submitted_s - self._arrival_s
        phases = [Phase(PhaseName.TOKENIZE, FRONTEND, 0.0, first)]
        ends_s = [attempt.submitted_s - self._arrival_s for attempt in self._attempts[1:]]
        for number, attempt in enumerate(self._attempts):
            end_s = ends_s[number] if number < len(ends_s) else elapsed_s
            phases += self._attempt_phases(attempt, number, end_s)
        if self._num_tokens:
            seconds = self._detokenize_s
            phases.append(Phase(PhaseName.DETOKENIZE, FRONTEND, max(0.0, elapsed_s - seconds), seconds))
        return phases

    def _attempt_phases(self, attempt: _Attempt, number: int, end_s: float) -> Iterable[Phase]:
        submitted_s = attempt.submitted_s - self._arrival_s
        if attempt.accepted_s is not None:
            placed_s = attempt.accepted_s - attempt.submitted_s
            yield Phase(PhaseName.PLACE, FRONTEND, submitted_s, placed_s, number)
        if (heard := attempt.prefill) is not None:
            timings = heard.timings
            stages = [(PhaseName.QUEUED, timings.queued_s), (PhaseName.PREFILL, timings.prefill_s)]
            yield from _before(heard.at_s - self._arrival_s, heard.instance, stages, submitted_s, number)
        if (heard := attempt.first) is not None:
            timings = heard.timings
            began_s = max(submitted_s, heard.at_s - self._arrival_s - timings.decode_s)
            stages = [
                (PhaseName.RESERVED, timings.reserved_s),
                (PhaseName.TRANSFER, timings.transfer_s),
                (PhaseName.WAITING, timings.waiting_s),
            ]
            yield from _before(began_s, heard.instance, stages, submitted_s, number)
            has_ended = attempt.num_ended == self._request.sampling.n
            seconds = attempt.decode_s if has_ended else end_s - began_s
            yield Phase(PhaseName.DECODE, heard.instance, began_s, max(0.0, seconds), number)


def _before(
    end_s: float, where: str, stages: list[tuple[PhaseName, float]], earliest_s: float, attempt: int
) -> list[Phase]:
    """Stages in their order, the last of which ends at `end_s`; those that took no time are left out."""
    phases: list[Phase] = []
    for name, seconds in reversed(stages):
        if seconds > 0.0:
            end_s = max(earliest_s, end_s - seconds)  # a message that was slow to come moves it later, never earlier
            phases.append(Phase(name, where, end_s, seconds, attempt))
    phases.reverse()
    return phases


def _covered_s(phases: Iterable[Phase], elapsed_s: float) -> float:
    """Seconds up to `elapsed_s` that at least one phase covers."""
    spans = [(p.start_s, p.start_s + p.seconds) for p in phases if p.name is not PhaseName.DETOKENIZE]
    spans.sort()
    covered_s = at_s = 0.0
    for start_s, end_s in spans:
        if end_s > at_s:
            covered_s += end_s - (start_s if start_s > at_s else at_s)
            at_s = end_s
    return min(covered_s, elapsed_s)


def server_timing(records: Iterable[RequestRecord]) -> str:
    """The value of a `Server-Timing` header (W3C): milliseconds by phase, and the instance that it was on."""
    metrics = []
    for record in records:
        metrics += [f'{p.name};dur={1000 * p.seconds:.3f};desc="{p.where}"' for p in record.phases]
        metrics.append(f"unaccounted;dur={1000 * record.unaccounted_s:.3f}")
        if record.ttft_s is not None:
            metrics.append(f"ttft;dur={1000 * record.ttft_s:.3f}")
        metrics.append(f"total;dur={1000 * record.elapsed_s:.3f}")
    return ", ".join(metrics)
