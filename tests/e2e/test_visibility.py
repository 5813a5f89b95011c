"""What operators see of a real cluster: metrics that are documented and drawn, timelines, spans, logs."""

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.server import Server, eventually, serving
from tests.otlp import Collector, collecting

DOCS = Path(__file__).parents[2] / "docs"
STEP_S = 0.02
SECRET = "nobody else is to read this"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
_NAME = re.compile(r"\bflowkv_[a-z0-9_]+\b")
_LABELS = re.compile(r"\b(?:by|on) \(([^)]*)\)|\{([^}]*)\}")
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@dataclass(frozen=True)
class Watched:
    server: Server
    collector: Collector
    header: str

    def families(self) -> dict[str, Metric]:
        """By the name of each series."""
        found = text_string_to_metric_families(self.server.client.get("/metrics").text)
        return {family.name + suffix: family for family in found for suffix in _SUFFIXES[family.type]}


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """A cluster that has answered one request and refused another."""
    with (
        collecting() as collector,
        serving(
            "--toy", "--decode", "2", "--roles", "fixed", "--set", f"toy_step_s={STEP_S}",
            "--log-format", "json", "--log-level", "info", "--otlp-endpoint", collector.url,
            environment={"OTEL_BSP_SCHEDULE_DELAY": "50"},
        ) as server,
    ):  # fmt: skip
        headers = {
            "x-flowkv-timeline": "1", "x-request-id": "find-me", "traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"
        }  # fmt: skip
        body = {"prompt": SECRET, "max_tokens": 8, "ignore_eos": True}
        answer = server.client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert server.client.post("/v1/completions", json=body | {"max_tokens": 10**6}).status_code == 400
        eventually(
            lambda: sum(server.gauge("flowkv_instance_transfer_bytes_total").values()) > 0, "a report of the transfer"
        )
        yield Watched(server, collector, answer.headers["server-timing"])


def expressions() -> list[str]:
    dashboard = json.loads((DOCS / "grafana" / "flowkv.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def asked_labels(expression: str) -> set[str]:
    """Those that it selects or sums by."""
    parts = [part for pair in _LABELS.findall(expression) for text in pair for part in text.split(",") if part]
    return {re.split(r"[=!~]", part)[0].strip() for part in parts}


def test_the_grafana_dashboard_asks_for_what_is_there(watched: Watched) -> None:
    families = watched.families()
    assert len(expressions()) > 50
    for expression in expressions():
        names = _NAME.findall(expression)
        assert names and not set(names) - families.keys(), expression
        samples = [sample for name in names for sample in families[name].samples]
        known = {label for sample in samples for label in sample.labels}
        assert not samples or asked_labels(expression) <= known, expression


def test_every_metric_is_documented_and_every_documented_one_is_there(watched: Watched) -> None:
    rows = re.findall(r"^\| (`flowkv_[^|]*) \|", (DOCS / "observability.md").read_text(), re.M)
    documented = {name for row in rows for name in _NAME.findall(row)}
    shown = {f.name + ("_total" if f.type == "counter" else "") for f in watched.families().values()}
    assert documented == {name for name in shown if name.startswith("flowkv_")}


def test_a_split_request_says_where_its_time_went(watched: Watched) -> None:
    phases = re.findall(r'(\w+);dur=[\d.]+;desc="([^"]+)"', watched.header)
    decoder = phases[-2][1]
    assert decoder.startswith("decode-")
    assert phases == [
        ("tokenize", "frontend"), ("place", "frontend"), ("queued", "prefill-0"), ("prefill", "prefill-0"),
        ("reserved", decoder), ("transfer", decoder), ("waiting", decoder), ("decode", decoder),
        ("detokenize", "frontend"),
    ]  # fmt: skip


def test_its_spans_belong_under_the_clients(watched: Watched) -> None:
    eventually(lambda: "text_completion toy" in watched.collector.names, "the request's span")
    spans = [span for span in watched.collector.spans if span.trace_id.hex() == TRACE_ID]
    assert {"text_completion toy", "prefill", "transfer", "decode"} <= {span.name for span in spans}


def test_every_line_is_an_object_and_none_has_the_prompt(watched: Watched) -> None:
    eventually(lambda: any("length" in line for line in watched.server.lines), "the line of the request")
    lines: list[dict[str, Any]] = [json.loads(line) for line in watched.server.lines]
    assert {line["process"] for line in lines} >= {"launcher", "frontend"}
    assert SECRET not in "".join(watched.server.lines)
    ended = [line for line in lines if "find-me" in line.get("request_id", "")]
    assert [(line["status"], line["prefill_instance"]) for line in ended] == [(200, "prefill-0")]
    assert [line["error"] for line in lines if line.get("status") == 400] == ["context_length_exceeded"]


def test_an_instance_that_is_killed_is_seen_everywhere(watched: Watched) -> None:
    server = watched.server
    body = {"prompt": "x" * 40, "max_tokens": 100, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(server.client.post, "/v1/completions", json=body)
        eventually(lambda: decoders(server) != [], "a request that is decoded")
        [victim] = decoders(server)
        os.kill(server.pid_of(victim), signal.SIGKILL)
        assert answering.result().status_code == 200
    record = server.client.get("/requests?limit=1").json()["recent"][0]
    assert record["num_attempts"] == 2
    assert next(phase["where"] for phase in record["phases"] if phase["name"] == "decode") == victim
    assert "flowkv_recoveries_total 1.0" in server.client.get("/metrics").text
    restarts = f'flowkv_process_restarts_total{{process="{victim}"}} 1.0'
    eventually(lambda: restarts in server.client.get("/metrics").text, "a line of the new process")
    line = next(line for line in map(json.loads, server.lines) if "what held it is gone" in line["message"])
    assert line["request_id"] == record["request_id"]


def decoders(server: Server) -> list[str]:
    """Of requests that run."""
    live = server.client.get("/requests").json()["live"]
    return [record["decode_instance"] for record in live if record["decode_instance"]]
