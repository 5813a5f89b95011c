"""Between HTTP and the cluster: submits requests, collects their outputs, ends what nobody reads any more.

No HTTP in here. Everything runs on one event loop, so no state needs a lock.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import msgspec

from flowkv.config import LimitsConfig, TracingConfig
from flowkv.errors import ProtocolError, RequestError
from flowkv.messages import (
    Abort,
    Accepted,
    AnyMessage,
    ClusterStatus,
    FrontendHello,
    Lost,
    Message,
    Outputs,
    Rejected,
    ServiceBeat,
)
from flowkv.metrics import FrontendMetrics
from flowkv.server.access.caller import current_caller
from flowkv.server.access.trace_context import current_traceparent
from flowkv.server.choice import Choice, Delta
from flowkv.server.limits import Limits
from flowkv.server.live_request import LiveRequest, TextOptions
from flowkv.server.records.access_log import log_ended
from flowkv.server.records.cluster_view import ClusterView
from flowkv.server.records.history import History
from flowkv.server.records.journal import Journal
from flowkv.server.records.timeline import RequestRecord, Timeline
from flowkv.server.records.watch import ClusterWatch
from flowkv.server.recovery import Recovery
from flowkv.server.stream import RequestStream
from flowkv.server.text.stop_strings import StopStrings
from flowkv.server.text.tokenizer import Tokenizer
from flowkv.types import GRAMMAR_ENDED, FinishReason, Output, Request
from flowkv.usage import UsageMeter
from flowkv.wire import AsyncMailbox, Outbox

_SILENCE_S = 5.0  # a controller speaks every second, at least
_MAX_ELAPSED_S = 2.0  # what is longer between two beats was no silence: this process itself was stopped

_logger = logging.getLogger(__name__)


class Frontend:
    def __init__(
        self,
        name: str,
        mailbox: AsyncMailbox,
        outbox: Outbox,
        controller_address: str,
        tokenizer: Tokenizer,
        *,
        beat_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        on_ready: Callable[[], None] = lambda: None,
        tell_launcher: Callable[[Message], None] = lambda _: None,
        limits: LimitsConfig | None = None,
        num_kept: int = TracingConfig().keep_requests,
    ) -> None:
        """`on_ready` is called once, when the cluster is ready for the first time. `num_kept` requests that have ended
        are remembered."""
        self.tokenizer = tokenizer
        self.status: ClusterStatus | None = None
        self.metrics = FrontendMetrics(lambda: self.status)
        self.journal = Journal(num_kept, [self.metrics.count_ended, log_ended])
        self.now_s = clock
        self.epoch = secrets.token_hex(8)  # of this process
        self.history = History(clock())
        self.watch = ClusterWatch(clock())
        self._status_s = clock()
        self._num_statuses = 0
        self._silent_s = 0.0  # the controller, while this process was awake
        self._beat_at_s = clock()
        self._name = name
        self._usage = UsageMeter(name)
        self._mailbox = mailbox
        self._outbox = outbox
        self._controller_address = controller_address
        self._beat_s = beat_s
        self._limits = limits or LimitsConfig()
        self._live: dict[str, LiveRequest] = {}
        self._is_closed = False
        self._drained_by_s: float | None = None  # nothing new is taken
        self._on_ready: Callable[[], None] | None = on_ready
        self.tell_launcher = tell_launcher

    @property
    def is_ready(self) -> bool:
        return self._why_closed() is None and self.status is not None and self.status.ready

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def count_refused(self, status: int, reason: str) -> None:
        """A call that was answered with an error, or cut off; `reason` is a code of ours, never a client's words."""
        self.metrics.count_refused(status, reason)
        self.history.refused(self.now_s())

    def live_records(self) -> list[RequestRecord]:
        """Of those that have not ended, the oldest first."""
        now_s = self.now_s()
        return [live.timeline.record(now_s) for live in self._live.values()]

    def limits(self) -> Limits:
        """Raises `RequestError` (503) while the cluster cannot take requests."""
        if (error := self._why_closed()) is not None:
            raise error
        if self.status is None or self.status.model is None or not self.status.ready:
            raise RequestError("the cluster is not ready yet", status=503, code="not_ready")
        return Limits.of(self.status.model, self.status.max_request_tokens, self._limits)

    def _why_closed(self) -> RequestError | None:
        """Whatever the controller said last of its cluster."""
        if self._is_closed:
            return RequestError("the server is shutting down", status=503, code="shutting_down")
        if self._drained_by_s is not None:
            return RequestError(
                "the server is draining and takes no new requests", status=503, code="shutting_down",
                retry_after_s=max(0.0, self._drained_by_s - self.now_s()),
            )  # fmt: skip
        if self.status is not None and self._silent_s >= _SILENCE_S:
            return RequestError(
                "the controller does not answer", status=503, code="not_ready", retry_after_s=_SILENCE_S
            )  # fmt: skip
        return None

    def view(self) -> ClusterView:
        """What is known of the cluster: nothing yet, before the controller has spoken."""
        age_s = self.now_s() - self._status_s
        if self.status is None:
            return ClusterView(time_s=self._status_s, age_s=age_s)
        return ClusterView.of(self.status, self._status_s, age_s, self.is_ready)

    async def run(self) -> None:
        """Receives until cancelled. A message that is not a frontend's is logged and dropped."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            while True:
                for message in await self._mailbox.receive():
                    try:
                        self._receive(message)
                    except ProtocolError as error:
                        self._mailbox.ignore(error)

    def submit(self, requests: list[Request], options: TextOptions, arrival_s: float) -> RequestStream:
        """One stream over all choices of all requests: choice c of request i has the number `i * n + c`."""
        num_choices = sum(request.sampling.n for request in requests)
        caller = current_caller()
        lives: list[LiveRequest] = []
        stream = RequestStream(num_choices, lambda: self._abort_all(lives))
        number, now_s = 0, self.now_s()
        for request in map(caller.ranked, requests):
            choices = [self._choice(number + c, request, options) for c in range(request.sampling.n)]
            number += len(choices)
            timeline = Timeline(
                request, time.time() - (now_s - arrival_s), arrival_s, now_s, caller.name, current_traceparent()
            )  # fmt: skip
            stream.timelines.append(timeline)
            live = LiveRequest(request, stream, choices, caller, arrival_s, timeline, Recovery(request.request_id))
            lives.append(live)
            self._live[request.request_id] = live
            caller.spend(len(request.prompt_ids), now_s)
            self.metrics.num_requests.inc()
            self.metrics.prompt_tokens.inc(len(request.prompt_ids))
            self.history.submitted(arrival_s, len(request.prompt_ids))
            self._submit(live)
        return stream

    def abort(self, request_id: str) -> None:
        """Stop a request and forget it; unknown ids are ignored."""
        live = self._live.pop(request_id, None)
        if live is None:
            return
        self._send(Abort(request_id))
        for choice in live.choices:
            if choice.finish_reason is None:
                self.metrics.count_finished(FinishReason.ABORT)
        if not live.timeline.is_over:
            live.timeline.aborted(self.now_s())
            self._remember(live)

    def drain(self, timeout_s: float) -> None:
        """No new requests; those that are open go on, and `close` comes within `timeout_s`."""
        self._drained_by_s = self.now_s() + timeout_s

    def close(self) -> None:
        """No new requests; every open stream ends with finish reason `abort`."""
        self._is_closed = True
        for request_id, live in list(self._live.items()):
            self.abort(request_id)
            for choice in live.choices:
                if choice.finish_reason is None:
                    live.stream.put(choice.end(FinishReason.ABORT, "the server is shutting down"))

    def tell_controller(self, message: Message) -> None:
        """What an operator wants of it."""
        self._send(message)

    def close_mailbox(self) -> None:
        """Once `run` has ended; a context with an open socket cannot end."""
        self._mailbox.close()

    # --- to the controller ---------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Says hello at every beat: a restarted controller learns of this frontend, and the status stays fresh."""
        while True:
            self._send(FrontendHello(self._name, self._mailbox.address))
            self.tell_launcher(ServiceBeat(self._name))
            await asyncio.sleep(self._beat_s)
            self._pass_time()
            for live in list(self._live.values()):
                if not live.timeline.is_over:  # with another of its stream
                    self._look_after(live)
            self._give_up_waiting()
            if (turned_away := self._mailbox.take_turned_away(self._name)) is not None:
                self._send(turned_away)
            if (usage := self._usage.take(self.now_s())) is not None:
                self._send(usage)

    def _pass_time(self) -> None:
        now_s = self.now_s()
        self._silent_s += min(now_s - self._beat_at_s, _MAX_ELAPSED_S)
        self._beat_at_s = now_s

    def _give_up_waiting(self) -> None:
        """A client that has waited so long for a first token hears so, and nothing is computed for it any more."""
        if not (timeout_s := self._limits.queue_timeout_s):
            return
        due_s = self.now_s() - timeout_s
        late = [live for live in self._live.values() if live.first_token_s is None and live.arrival_s <= due_s]
        for live in late:
            if live.timeline.is_over:  # with another of its stream
                continue
            reason = f"no token came within the {timeout_s:g} s that a request may wait here"
            self._fail(live, RequestError(reason, status=503, code="queue_timeout", retry_after_s=timeout_s))

    def _submit(self, live: LiveRequest) -> None:
        live.num_statuses = self._num_statuses
        self._send(live.submit(self._name, self.status.controller if self.status is not None else ""))

    def _look_after(self, live: LiveRequest) -> None:
        """At every beat: submit it again until it is answered; give an attempt up of which something was lost.

        Nothing is repeated to a controller that has not spoken since: it would find it all when it wakes."""
        now_s = self.now_s()
        if live.is_answered and live.recovery.is_broken(any(choice.has_gap for choice in live.choices), now_s):
            self._resume(live)
            return
        if live.is_answered and live.recovery.is_silent(now_s):
            live.claim(now_s)
        if live.is_answered:
            return
        try:
            live.recovery.check_patience(now_s)
        except RequestError as error:
            self._give_up(live, error)
        else:
            if live.num_statuses != self._num_statuses:
                self._submit(live)

    def _resume(self, live: LiveRequest, *, died: bool = False) -> None:
        """Go on elsewhere, after what has come so far: of this attempt nothing more is heard."""
        old_id = live.request.request_id
        try:
            live.resume(self.now_s(), died=died)
        except RequestError as error:
            self._give_up(live, error)
            return
        del self._live[old_id]
        self._live[live.request.request_id] = live
        live.timeline.resubmitted(self.now_s())
        _logger.info("goes on as %s: what held it is gone", live.request.request_id, extra={"request_id": old_id})
        self.metrics.num_recoveries.inc()
        self.metrics.recovered_tokens.inc(live.num_tokens_to_compute)
        self._submit(live)

    def _give_up(self, live: LiveRequest, error: RequestError) -> None:
        """What was accepted cannot be brought to its end."""
        request_id = live.request.request_id
        del self._live[request_id]
        self._send(Abort(request_id))
        self._count_failed(live)
        self._fail(live, error)

    def _count_failed(self, live: LiveRequest) -> None:
        """What was accepted has come to nothing, wherever that is counted."""
        self.history.ended(self.now_s(), failed=True)
        for choice in live.choices:
            if choice.finish_reason is None:
                self.metrics.count_finished(FinishReason.ERROR)

    def _send(self, message: Message) -> None:
        self._outbox.send(self._controller_address, message)

    def _abort_all(self, lives: list[LiveRequest]) -> None:
        for live in lives:
            self.abort(live.request.request_id)

    # --- from the cluster ----------------------------------------------------------------------------------------

    def _receive(self, message: AnyMessage) -> None:
        match message:
            case Outputs():
                self._on_outputs(message)
            case Accepted(request_id=request_id):
                if (live := self._live.get(request_id)) is not None:
                    live.is_answered, live.is_claim = True, False
                    live.recovery.heard(self.now_s())
                    live.timeline.accepted(self.now_s())
            case Rejected():
                self._on_rejected(message)
            case Lost():
                self._on_lost(message)
            case ClusterStatus():
                self._on_status(message)
            case _:
                raise ProtocolError(f"a frontend does not take {type(message).__name__}")

    def _on_lost(self, message: Lost) -> None:
        if (live := self._live.get(message.request_id)) is not None:
            self._resume(live, died=message.died)
        else:
            self._send(Abort(message.request_id))

    def _on_status(self, status: ClusterStatus) -> None:
        is_new = self.status is not None and status.controller != self.status.controller
        if status.model is None and self.status is not None:  # of a controller that knows no instance yet
            model, max_tokens = self.status.model, self.status.max_request_tokens
            status = msgspec.structs.replace(status, model=model, max_request_tokens=max_tokens)
        self.status, self._status_s = status, self.now_s()
        self._num_statuses, self._silent_s = self._num_statuses + 1, 0.0
        self.watch.observe(self._status_s, status)
        self.history.holds(self._status_s, self.watch.held())
        if is_new:
            self._claim_all()
        if status.ready and self._on_ready is not None:
            self._on_ready()
            self._on_ready = None

    def _claim_all(self) -> None:
        """The controller was started again and knows of no request: these may still run."""
        for live in self._live.values():
            live.claim(self.now_s())
            self._submit(live)

    def _on_rejected(self, message: Rejected) -> None:
        live = self._live.pop(message.request_id, None)
        if live is None:
            return
        error = RequestError(
            message.message, status=message.status, code=message.code, param=message.param,
            retry_after_s=message.retry_after_s,
        )  # fmt: skip
        if live.recovery.num_attempts:  # accepted, and lost since
            self._count_failed(live)
        self._fail(live, error)

    def _fail(self, live: LiveRequest, error: RequestError) -> None:
        """The stream's other requests have no reader any more."""
        live.timeline.failed(error, self.now_s())
        self._remember(live)
        live.stream.fail(error)
        live.stream.abort()

    def _remember(self, live: LiveRequest) -> None:
        self.journal.add(live.timeline.record(self.now_s()))

    def _on_outputs(self, message: Outputs) -> None:
        now_s = self.now_s()
        unknown: set[str] = set()
        for output in message.outputs:
            live = self._live.get(output.request_id)
            if live is not None:
                if output.timings is not None:
                    live.timeline.heard(message.instance, output, output.timings, now_s)
                self._on_output(live, self._checked(output), now_s)
            elif output.finish_reason is None:
                unknown.add(output.request_id)
        for request_id in unknown:
            # An Abort was lost with a controller, or came before the request: whoever runs it has no reader.
            self._send(Abort(request_id))

    def _checked(self, output: Output) -> Output:
        """The end of a choice instead of what cannot be: tokens that the model has not, or that lack their logprobs."""
        vocab_size = 0 if self.status is None or self.status.model is None else self.status.model.vocab_size
        num_logprobs = len(output.token_ids) if output.logprobs is None else len(output.logprobs)
        if max(output.token_ids, default=-1) < vocab_size and num_logprobs == len(output.token_ids):
            return output
        reason = "an instance has put out what no token of the model is"
        return msgspec.structs.replace(
            output, token_ids=[], logprobs=None, finish_reason=FinishReason.ERROR, error=reason
        )  # fmt: skip

    def _on_output(self, live: LiveRequest, output: Output, now_s: float) -> None:
        if output.choice >= len(live.choices):
            return
        live.recovery.heard(now_s)
        choice = live.choices[output.choice]
        began_s = self.now_s()
        delta = choice.accept(output)
        if delta is None:
            return
        live.timeline.put_out(len(delta.token_ids), self.now_s() - began_s, now_s)
        self._measure(live, delta, now_s)
        if live.stream.unread_bytes > self._limits.slow_reader_bytes:
            self._on_slow_reader(live)
            return
        live.stream.put(delta)
        if delta.finish_reason is not None:
            self._on_finished(live, output, delta, now_s)

    def _on_slow_reader(self, live: LiveRequest) -> None:
        """Its client does not take what is there; the connection is cut by whoever watches that."""
        self.count_refused(408, "slow_reader")
        live.stream.drop_unread()
        self._fail(live, RequestError("the client did not read what was sent", status=408, code="slow_reader"))

    def _on_finished(self, live: LiveRequest, output: Output, delta: Delta, now_s: float) -> None:
        request_id = live.request.request_id
        if output.finish_reason is None:  # a stop string: only the frontend knows that this is the end
            self._send(Abort(request_id, output.choice))
        if live.is_finished:
            del self._live[request_id]
            self.metrics.e2e_s.observe(now_s - live.arrival_s)
            self.history.ended(now_s, failed=delta.finish_reason is FinishReason.ERROR)
        if delta.finish_reason is FinishReason.ERROR:
            self._fail(live, _failure(delta.error))
        elif live.is_finished:
            assert delta.finish_reason is not None
            live.timeline.finished(delta.finish_reason, now_s)
            self._remember(live)

    def _measure(self, live: LiveRequest, delta: Delta, now_s: float) -> None:
        if delta.finish_reason is not None:
            self.metrics.count_finished(delta.finish_reason)
        if not delta.token_ids:
            return
        self.metrics.output_tokens.inc(len(delta.token_ids))
        live.caller.spend(len(delta.token_ids), now_s)
        if live.first_token_s is None:
            live.first_token_s = now_s
            self.metrics.ttft_s.observe(now_s - live.arrival_s)
            self.history.first_token(now_s, now_s - live.arrival_s)
        last_s = live.last_token_s.get(delta.choice)
        live.last_token_s[delta.choice] = now_s
        gap_s = None if last_s is None else (now_s - last_s) / len(delta.token_ids)
        self.history.tokens(now_s, len(delta.token_ids), gap_s)
        if gap_s is not None:
            self.metrics.itl_s.observe(gap_s, len(delta.token_ids))

    def _choice(self, number: int, request: Request, options: TextOptions) -> Choice:
        detokenizer = self.tokenizer.detokenizer(
            skip_special_tokens=options.skip_special_tokens, kept=options.kept_tokens
        )
        stops = StopStrings(options.stop_strings, options.include_stop)
        return Choice(number, detokenizer, stops, request.sampling.min_tokens)


def _failure(reason: str | None) -> RequestError:
    """Of what an instance has ended with an error: nobody's fault but its own, unless it says so."""
    if reason == GRAMMAR_ENDED:
        return RequestError(reason, code="grammar_too_complex")
    return RequestError(reason or "the instance that held the request failed", status=500, code="instance_failed")
