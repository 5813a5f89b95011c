"""Prometheus metrics of a cluster, as its frontend sees them.

Latencies and token counts are measured by the frontend; the rest is what each instance reports of itself, exported
under its name. An instance that is started again has a new name, so its totals start a new series at zero.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flowkv.types import FinishReason, InstanceStatus

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0, 2.5)

LOAD_GAUGES = {
    "num_waiting": ("waiting", "Requests whose prefill has not started"),
    "num_prefilling": ("prefilling", "Requests in prefill"),
    "num_decoding": ("decoding", "Choices in the decode queue"),
    "num_sending": ("sending", "Requests prefilled here whose KV has not reached its decode instance"),
    "num_receiving": ("receiving", "Requests reserved here whose KV is not here yet"),
    "waiting_tokens": ("waiting_tokens", "Prompt tokens still to be computed"),
    "free_blocks": ("blocks_free", "KV blocks free"),
    "used_blocks": ("blocks_used", "KV blocks in use, reserved ones included"),
    "reserved_blocks": ("blocks_reserved", "KV blocks being filled by a peer"),
    "quarantined_blocks": (
        "blocks_quarantined",
        "KV blocks given up whose writer has not acknowledged it: not to be used before it has",
    ),
}
COUNTERS = {
    "num_steps": ("steps", "Steps"),
    "prefill_tokens": ("prefill_tokens", "Prompt tokens computed"),
    "decode_tokens": ("decode_tokens", "Tokens computed one a step"),
    "num_preemptions": ("preemptions", "Sequences whose blocks were taken to run others"),
    "step_seconds": ("step_seconds", "Time in steps"),
    "forward_seconds": ("forward_seconds", "Time in the model's forward pass"),
    "sampling_seconds": ("sampling_seconds", "Time in sampling"),
    "transfer_bytes": ("transfer_bytes", "KV bytes moved to peers"),
    "transfer_calls": ("transfer_calls", "Calls that moved them, one a run"),
    "transfer_seconds": ("transfer_seconds", "Time in transfers"),
    "transfer_exposed_seconds": ("transfer_exposed_seconds", "Time in transfers after the last chunk was computed"),
    "num_transfers": ("transfers", "Requests handed to another instance"),
    "num_local_fallbacks": ("local_fallbacks", "Requests decoded where they were prefilled for want of room"),
    "num_moved_blocks": ("moved_blocks", "KV blocks moved within the pool so that a reservation lies together"),
    "num_expired_leases": (
        "expired_leases",
        "Reservations given up because the peer that was to fill them fell silent",
    ),
}
LINK_COUNTERS = {
    "num_bytes": ("bytes", "KV bytes written to the peer"),
    "num_calls": ("calls", "Calls that wrote them, one a run"),
    "seconds": ("seconds", "Time spent writing them"),
}


class InstancesCollector(Collector):
    """What the instances last reported. `statuses` is called at every scrape."""

    def __init__(self, statuses: Callable[[], Iterable[InstanceStatus]]) -> None:
        self._statuses = statuses

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        statuses = list(self._statuses())
        yield from self._gauges(statuses)
        for field, (name, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"flowkv_instance_{name}", text, labels=["instance", "role"])
            for status in statuses:
                counter.add_metric([status.name, status.role], getattr(status.counters, field))
            yield counter
        yield from self._links(statuses)

    @staticmethod
    def _links(statuses: list[InstanceStatus]) -> Iterator[Metric]:
        """One series a direction; a link that is up is there, with zeros if need be."""
        for field, (name, text) in LINK_COUNTERS.items():
            counter = CounterMetricFamily(f"flowkv_link_{name}", text, labels=["instance", "peer", "backend"])
            for status in statuses:
                for link in status.links:
                    counter.add_metric([status.name, link.peer, link.backend], getattr(link, field))
            yield counter

    @staticmethod
    def _gauges(statuses: list[InstanceStatus]) -> Iterator[Metric]:
        for field, (name, text) in LOAD_GAUGES.items():
            gauge = GaugeMetricFamily(f"flowkv_instance_{name}", text, labels=["instance", "role"])
            for status in statuses:
                gauge.add_metric([status.name, status.role], getattr(status.load, field))
            yield gauge
        total = GaugeMetricFamily("flowkv_instance_blocks_total", "KV blocks of the pool", labels=["instance", "role"])
        for status in statuses:
            total.add_metric([status.name, status.role], status.num_blocks)
        yield total
        text = "1 where nothing has been heard of it for too long: it gets no requests until it is heard again"
        stalled = GaugeMetricFamily("flowkv_instance_stalled", text, labels=["instance", "role"])
        for status in statuses:
            stalled.add_metric([status.name, status.role], status.is_stalled)
        yield stalled


class FrontendMetrics:
    """One registry a frontend; nothing global, so that several may live in one process."""

    def __init__(self, statuses: Callable[[], Iterable[InstanceStatus]]) -> None:
        self.registry = CollectorRegistry()
        self.ttft_s = self._histogram("ttft", "Arrival to first token", LATENCY_BUCKETS_S)
        self.itl_s = self._histogram("itl", "Gap between two output tokens of a choice", ITL_BUCKETS_S)
        self.e2e_s = self._histogram("e2e", "Arrival to the end of the last choice", LATENCY_BUCKETS_S)
        self.num_requests = self._counter("requests", "Requests submitted")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of submitted requests")
        self.output_tokens = self._counter("output_tokens", "Tokens sent to clients")
        finished = "Choices that ended, by why (stop, length, abort or error)"
        self._finished = Counter("flowkv_choices_finished", finished, ["finish_reason"], registry=self.registry)
        refused = "Requests answered with an error, by HTTP status"
        self._refused = Counter("flowkv_requests_refused", refused, ["status"], registry=self.registry)
        for reason in FinishReason:
            self._finished.labels(reason.value)
        self.registry.register(InstancesCollector(statuses))

    def count_finished(self, reason: FinishReason) -> None:
        self._finished.labels(reason.value).inc()

    def count_refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def render(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"flowkv_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"flowkv_{name}", text, registry=self.registry)
