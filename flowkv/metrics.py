"""Prometheus metrics of a frontend: what it measures itself, and what it hears of the cluster (`cluster_metrics`)."""

from collections.abc import Callable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest

from flowkv.cluster_metrics import Cluster, ClusterCollector
from flowkv.histogram import Histogram, LabelledHistogram
from flowkv.types import FinishReason

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody looks at

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PHASE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *LATENCY_BUCKETS_S)
TOKEN_BUCKETS = tuple(2**power for power in range(0, 19, 2))
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0, 2.5)


class Phase(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def seconds(self) -> float: ...


class EndedRequest(Protocol):
    """What is measured of a request once it is over."""

    @property
    def phases(self) -> Sequence[Phase]: ...

    @property
    def tpot_s(self) -> float | None: ...

    @property
    def unaccounted_s(self) -> float: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...


class FrontendMetrics:
    """One registry a frontend; nothing global, so that several may live in one process."""

    def __init__(self, cluster: Callable[[], Cluster | None]) -> None:
        self.registry = CollectorRegistry()
        self.ttft_s = self._histogram("ttft", "Arrival to first token", LATENCY_BUCKETS_S)
        self.itl_s = self._histogram("itl", "Gap between two output tokens of a choice", ITL_BUCKETS_S)
        self.e2e_s = self._histogram("e2e", "Arrival to the end of the last choice", LATENCY_BUCKETS_S)
        self.tpot_s = self._histogram("tpot", "Mean gap between the output tokens of a request", ITL_BUCKETS_S)
        text = "Time of a request in each phase of its life; docs/observability.md lists them"
        self._phase_s = LabelledHistogram("flowkv_phase_seconds", text, "phase", PHASE_BUCKETS_S)
        self.registry.register(self._phase_s)
        self._request_prompt_tokens = self._sizes("prompt", "Prompt tokens of a request")
        self._request_output_tokens = self._sizes("output", "Output tokens of a request, of all of its choices")
        self.num_requests = self._counter("requests", "Requests submitted")
        self.num_recoveries = self._counter(
            "recoveries", "Requests that went on elsewhere after their instance was lost"
        )
        self.recovered_tokens = self._counter(
            "recovered_tokens", "Tokens of these requests, prompt and output so far, to be computed again"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of submitted requests")
        self.output_tokens = self._counter("output_tokens", "Tokens sent to clients")
        finished = "Choices that ended, by why (stop, length, abort or error)"
        self._finished = Counter("flowkv_choices_finished", finished, ["finish_reason"], registry=self.registry)
        refused = "Requests answered with an error, by HTTP status"
        self._refused = Counter("flowkv_requests_refused", refused, ["status"], registry=self.registry)
        rejected = "Requests answered with an error, or cut off, by why"
        self._rejected = Counter("flowkv_rejections", rejected, ["reason"], registry=self.registry)
        for reason in FinishReason:
            self._finished.labels(reason.value)
        self.registry.register(ClusterCollector(cluster))

    def count_ended(self, request: EndedRequest) -> None:
        """Once a request, whatever became of it."""
        for phase in request.phases:
            self._phase_s.observe(phase.name, phase.seconds)
        self._phase_s.observe("unaccounted", request.unaccounted_s)
        self._request_prompt_tokens.observe(request.prompt_tokens)
        self._request_output_tokens.observe(request.output_tokens)
        if request.tpot_s is not None:
            self.tpot_s.observe(request.tpot_s)

    def count_finished(self, reason: FinishReason) -> None:
        self._finished.labels(reason.value).inc()

    def count_refused(self, status: int, reason: str) -> None:
        self._refused.labels(str(status)).inc()
        self._rejected.labels(reason).inc()

    def render(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"flowkv_{name}_seconds", text, buckets)
        self.registry.register(histogram)
        return histogram

    def _sizes(self, name: str, text: str) -> Histogram:
        histogram = Histogram(f"flowkv_request_{name}_tokens", text, TOKEN_BUCKETS)
        self.registry.register(histogram)
        return histogram

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"flowkv_{name}", text, registry=self.registry)
