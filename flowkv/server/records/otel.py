"""A request's timeline as OpenTelemetry spans: one for the request, and one inside for each phase.

Made when the request is over, in a thread of their own, so that tracing costs a request nothing. Names and attributes
are those of the semantic conventions for generative AI; what is FlowKV's own begins with `flowkv.`.
"""

import logging
import threading
from importlib.metadata import PackageNotFoundError, version
from queue import Full, Queue
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flowkv.server.records.timeline import PhaseName, RequestRecord

_MAX_WAITING = 4096  # requests; those beyond are dropped
_CLOSE_S = 2.0
_TRACES_PATH = "/v1/traces"
_COMPLETION_PREFIX = "cmpl-"  # of request ids

_logger = logging.getLogger(__name__)


class OtelSpans:
    def __init__(self, provider: TracerProvider, model_name: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("flowkv", _version())
        self._model_name = model_name
        self._propagator = TraceContextTextMapPropagator()
        self._records: Queue[RequestRecord | None] = Queue(_MAX_WAITING)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="flowkv-spans", daemon=True)
        self._thread.start()

    @classmethod
    def over_http(cls, endpoint: str | None, model_name: str) -> "OtelSpans":
        """To a collector's base URL, or to where the variables OTEL_EXPORTER_OTLP_... say; these also give headers,
        certificates, the sampler and the attributes of the resource."""
        resource = Resource.create({SERVICE_NAME: "flowkv"}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        url = None if endpoint is None else endpoint.rstrip("/").removesuffix(_TRACES_PATH) + _TRACES_PATH
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
        return cls(provider, model_name)

    def add(self, record: RequestRecord) -> None:
        try:
            self._records.put_nowait(record)
        except Full:
            self._num_dropped += 1
            if self._num_dropped == 1:
                _logger.warning("spans of requests are dropped: more come than can be sent")

    def close(self) -> None:
        try:
            self._records.put(None, timeout=_CLOSE_S)
        except Full:
            return
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            self._write(record)
        self._provider.shutdown()

    def _write(self, record: RequestRecord) -> None:
        operation = "text_completion" if record.request_id.startswith(_COMPLETION_PREFIX) else "chat"
        parent = self._tracer.start_span(
            f"{operation} {self._model_name}",
            context=self._parent(record),
            kind=SpanKind.SERVER,
            attributes=_attributes(record, operation, self._model_name),
            start_time=_at_ns(record, 0.0),
        )
        inside = set_span_in_context(parent)
        for phase in record.phases:
            if phase.name is PhaseName.DETOKENIZE:  # a sum of many moments, and no time of its own
                continue
            span = self._tracer.start_span(
                phase.name.value,
                context=inside,
                attributes={"flowkv.process": phase.where, "flowkv.attempt": phase.attempt},
                start_time=_at_ns(record, phase.start_s),
            )
            span.end(_at_ns(record, phase.start_s + phase.seconds))
        if record.status is not None and record.status >= 500:
            parent.set_status(Status(StatusCode.ERROR, record.error))
        parent.end(_at_ns(record, record.elapsed_s))

    def _parent(self, record: RequestRecord) -> Context:
        carrier = {} if record.traceparent is None else {"traceparent": record.traceparent}
        return self._propagator.extract(carrier, Context())


def _at_ns(record: RequestRecord, seconds: float) -> int:
    return int(record.arrived_at * 1e9) + int(seconds * 1e9)


def _attributes(record: RequestRecord, operation: str, model_name: str) -> dict[str, Any]:
    detokenize_s = sum(phase.seconds for phase in record.phases if phase.name is PhaseName.DETOKENIZE)
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "flowkv",
        "gen_ai.request.model": model_name,
        "gen_ai.request.choice.count": record.num_choices,
        "gen_ai.response.model": model_name,
        "gen_ai.response.id": record.request_id,
        "gen_ai.response.finish_reasons": None if record.finish_reason is None else [record.finish_reason.value],
        "gen_ai.response.time_to_first_chunk": record.ttft_s,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "error.type": record.error,
        "http.response.status_code": record.status,
        "flowkv.state": record.state.value,
        "flowkv.key": record.key,
        "flowkv.prefill_instance": record.prefill_instance,
        "flowkv.decode_instance": record.decode_instance,
        "flowkv.num_attempts": record.num_attempts,
        "flowkv.tpot_s": record.tpot_s,
        "flowkv.detokenize_s": detokenize_s,
        "flowkv.unaccounted_s": record.unaccounted_s,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _version() -> str:
    try:
        return version("flowkv")
    except PackageNotFoundError:
        return "unknown"
