"""Spans, as a collector gets them."""

import sys
from collections.abc import Iterator

import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from flowkv.config import TracingConfig
from flowkv.errors import ConfigError
from flowkv.server.records.otel import OtelSpans
from flowkv.server.records.timeline import RequestRecord, State
from flowkv.server.records.tracing import open_spans
from tests.otlp import Collector, collecting
from tests.server.conftest import Served
from tests.server.records.test_timeline import ARRIVAL_S, ARRIVED_AT, split_request

RECORD = split_request().record(ARRIVAL_S + 9.0)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def spans_of(record: RequestRecord) -> tuple[ReadableSpan, dict[str, ReadableSpan]]:
    """That of the request, and those inside by name."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = OtelSpans(provider, "toy")
    spans.add(record)
    spans.close()
    found = list(exporter.get_finished_spans())
    [parent] = [span for span in found if span.kind is SpanKind.SERVER]
    assert parent.context is not None
    inside = {span.name: span for span in found if span is not parent}
    assert all(span.parent is not None and span.parent.span_id == parent.context.span_id for span in inside.values())
    return parent, inside


def test_a_request_is_a_span_with_one_for_each_phase() -> None:
    parent, inside = spans_of(msgspec.structs.replace(RECORD, request_id="cmpl-1-0"))
    assert list(inside) == ["tokenize", "place", "queued", "prefill", "reserved", "transfer", "waiting", "decode"]
    assert parent.name == "text_completion toy"
    begin_ns = int(ARRIVED_AT * 1e9)
    assert (parent.start_time, parent.end_time) == (begin_ns, begin_ns + 5 * 10**9)
    assert (inside["decode"].start_time, inside["decode"].end_time) == (
        begin_ns + 2_750_000_000,
        begin_ns + 5 * 10**9,
    )
    assert dict(inside["transfer"].attributes or {}) == {"flowkv.process": "d", "flowkv.attempt": 0}


def test_its_attributes_are_those_of_the_conventions() -> None:
    parent, _ = spans_of(msgspec.structs.replace(RECORD, request_id="chatcmpl-1-0"))
    attributes = dict(parent.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "toy"
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (7, 5)
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["gen_ai.response.time_to_first_chunk"] == 2.0
    assert "error.type" not in attributes


def test_it_belongs_under_the_clients_span() -> None:
    parent, _ = spans_of(msgspec.structs.replace(RECORD, traceparent=TRACEPARENT))
    assert parent.parent is not None and parent.context is not None
    assert f"{parent.context.trace_id:032x}-{parent.parent.span_id:016x}" == TRACEPARENT[3:52]


@pytest.mark.parametrize(("status", "code"), [(503, StatusCode.ERROR), (429, StatusCode.UNSET)])
def test_only_a_failure_of_ours_is_an_error(status: int, code: StatusCode) -> None:
    parent, _ = spans_of(msgspec.structs.replace(RECORD, state=State.FAILED, status=status, error="why"))
    assert parent.status.status_code is code
    assert dict(parent.attributes or {})["error.type"] == "why"


# --- over HTTP -----------------------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.mark.parametrize("is_configured", [True, False])
def test_a_collector_gets_what_is_left_when_the_server_stops(collector: Collector, is_configured: bool) -> None:
    config = TracingConfig(otlp_endpoint=collector.url if is_configured else None)
    environ = {} if is_configured else {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environ | {"OTEL_SERVICE_NAME": "mine"}).items():
            patch.setenv(name, value)
        spans = open_spans(config, environ, "toy")
    assert spans is not None
    spans.add(RECORD)
    spans.close()
    assert {path for path, _ in collector.received} == {"/v1/traces"}
    assert "decode" in collector.names
    resource = collector.received[0][1].resource_spans[0].resource
    assert ("service.name", "mine") in [(a.key, a.value.string_value) for a in resource.attributes]


def test_nobody_asks() -> None:
    assert open_spans(TracingConfig(), {}, "toy") is None
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert open_spans(TracingConfig(), environ | {"OTEL_SDK_DISABLED": "true"}, "toy") is None
    assert open_spans(TracingConfig(), environ | {"OTEL_TRACES_EXPORTER": "none"}, "toy") is None


def test_without_the_packages_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "flowkv.server.records.otel", None)
    with pytest.raises(ConfigError, match=r"pip install 'flowkv\[otel\]'"):
        open_spans(TracingConfig(otlp_endpoint="http://127.0.0.1:1"), {}, "toy")
    assert open_spans(TracingConfig(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, "toy") is None
    assert "flowkv[otel]" in caplog.text


@pytest.mark.parametrize(
    ("sent", "kept"), [(TRACEPARENT, TRACEPARENT), ("00-junk", None), ("00-" + "0" * 32 + "-b7ad6b7169203331-01", None)]
)
def test_the_clients_traceparent_is_kept_where_it_is_one(served: Served, sent: str, kept: str | None) -> None:
    served.client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}, headers={"traceparent": sent})
    assert served.client.get("/requests").json()["recent"][0]["traceparent"] == kept
