"""What controller, instances and other processes say of themselves, as Prometheus metrics.

Exported under the name of an instance. One that is started again has a new name, so its totals start a new series at
zero. Its role is a label of what it holds at a moment, never of a total: a role may change, and a total must not begin
anew with it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flowkv.types import InstanceStatus, LinkStatus, ProcessUsage, Regime, Role

LOAD_GAUGES = {
    "num_waiting": ("waiting", "Requests whose prefill has not started"),
    "num_preempted": ("preempted", "Of the waiting requests those whose blocks were taken to run others"),
    "num_prefilling": ("prefilling", "Requests in prefill"),
    "num_decoding": ("decoding", "Choices in the decode queue"),
    "num_sending": ("sending", "Requests prefilled here whose KV has not reached its decode instance"),
    "num_receiving": ("receiving", "Requests reserved here whose KV is not here yet"),
    "waiting_tokens": ("waiting_tokens", "Prompt tokens still to be computed"),
    "waiting_pairs": ("waiting_pairs", "Pairs of such a token and a position that it attends to"),
    "deferred_tokens": ("deferred_tokens", "Prompt tokens of requests that let all others pass; not in waiting_tokens"),
    "deferred_pairs": ("deferred_pairs", "Pairs of such a token and a position that it attends to"),
    "decode_context_tokens": ("decode_context_tokens", "KV slots that one step of the decode queue reads"),
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
LINK_GAUGES: dict[str, tuple[str, Callable[[LinkStatus], float]]] = {
    "health": ("1 where no write over the link has failed lately, towards 0 the more did", attrgetter("health")),
    "best_bytes_per_second": ("Of the fastest write: what the link can do", attrgetter("best_bytes_per_s")),
    "line_rate_fraction": (
        "Bytes written per second of writing, over the best; 0 before the first write",
        lambda link: link.num_bytes / (link.seconds * link.best_bytes_per_s) if link.best_bytes_per_s else 0.0,
    ),
}
PROCESS_GAUGES = {
    "resident_bytes": ("Memory that the process has in RAM, its KV pool included", "resident_bytes"),
    "open_files": ("Open file descriptors", "open_files"),
}
PROCESS_COUNTERS = {
    "cpu_seconds": ("Processor time since the process started", "cpu_seconds"),
    "restarts": ("Times that another process took the place of one that had ended", "num_restarts"),
}
FLAGS = {
    "is_stalled": (
        "stalled",
        "1 where nothing has been heard of it for too long: it gets no requests until it is heard again",
    ),
    "is_draining": ("draining", "1 where it finishes what it has and then ends: it gets no requests"),
}


class Cluster(Protocol):
    """What is exported of a cluster's status, whatever carries it here."""

    @property
    def instances(self) -> Sequence[InstanceStatus]: ...

    @property
    def regime(self) -> Regime: ...

    @property
    def num_refused(self) -> int: ...

    @property
    def turned_away(self) -> Mapping[str, tuple[int, int]]: ...

    @property
    def processes(self) -> Mapping[str, ProcessUsage]: ...


class ClusterCollector(Collector):
    """What controller and instances last reported. `cluster` is called at every scrape; None: nothing is known yet."""

    def __init__(self, cluster: Callable[[], Cluster | None]) -> None:
        self._cluster = cluster

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        if (cluster := self._cluster()) is None:
            return
        yield from self._controller(cluster)
        yield from self._turned_away(cluster.turned_away)
        yield from self._processes(cluster.processes)
        yield from self._gauges(cluster.instances)
        yield from self._counters(cluster.instances)
        yield from self._links(cluster.instances)

    @staticmethod
    def _controller(cluster: Cluster) -> Iterator[Metric]:
        text = "1 for the regime that the cluster is in, 0 for the others"
        regime = GaugeMetricFamily("flowkv_cluster_regime", text, labels=["regime"])
        for value in Regime:
            regime.add_metric([value], cluster.regime is value)
        yield regime
        text = "Requests that admission by SLO turned away"
        yield CounterMetricFamily("flowkv_requests_refused_by_admission", text, value=cluster.num_refused)
        flips = CounterMetricFamily("flowkv_role_flips", "Changes of its role by the controller", labels=["instance"])
        for status in cluster.instances:
            flips.add_metric([status.name], status.num_flips)
        yield flips

    @staticmethod
    def _turned_away(counts: Mapping[str, tuple[int, int]]) -> Iterator[Metric]:
        connections = "Connections to a process's mailbox that did not hold the cluster's key"
        strangers = CounterMetricFamily("flowkv_strangers", connections, labels=["where"])
        ignored = CounterMetricFamily("flowkv_messages_ignored", "Messages that made no sense", labels=["where"])
        for where, (num_connections, num_messages) in counts.items():
            strangers.add_metric([where], num_connections)
            ignored.add_metric([where], num_messages)
        yield strangers
        yield ignored

    @staticmethod
    def _processes(usages: Mapping[str, ProcessUsage]) -> Iterator[Metric]:
        """By place, so that a series goes on where another process takes one's place."""
        for name, (text, field) in PROCESS_GAUGES.items():
            gauge = GaugeMetricFamily(f"flowkv_process_{name}", text, labels=["process"])
            for place, usage in usages.items():
                gauge.add_metric([place], getattr(usage, field))
            yield gauge
        for name, (text, field) in PROCESS_COUNTERS.items():
            counter = CounterMetricFamily(f"flowkv_process_{name}", text, labels=["process"])
            for place, usage in usages.items():
                counter.add_metric([place], getattr(usage, field))
            yield counter

    @staticmethod
    def _gauges(statuses: Sequence[InstanceStatus]) -> Iterator[Metric]:
        """The role is that of now: the series of another role ends when it changes."""

        def gauge(name: str, text: str, value: Callable[[InstanceStatus], float]) -> Metric:
            family = GaugeMetricFamily(f"flowkv_instance_{name}", text, labels=["instance", "role"])
            for status in statuses:
                family.add_metric([status.name, status.role], value(status))
            return family

        for field, (name, text) in LOAD_GAUGES.items():
            yield gauge(name, text, attrgetter(f"load.{field}"))
        roles = GaugeMetricFamily(
            "flowkv_instance_role", "1 for the role that it has, 0 for the others", labels=["instance", "role"]
        )
        for status in statuses:
            for role in Role:
                roles.add_metric([status.name, role], status.role is role)
        yield roles
        yield gauge("blocks_total", "KV blocks of the pool", attrgetter("num_blocks"))
        for field, (name, text) in FLAGS.items():
            yield gauge(name, text, attrgetter(field))

    @staticmethod
    def _counters(statuses: Sequence[InstanceStatus]) -> Iterator[Metric]:
        for field, (name, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"flowkv_instance_{name}", text, labels=["instance"])
            for status in statuses:
                counter.add_metric([status.name], getattr(status.counters, field))
            yield counter

    @staticmethod
    def _links(statuses: Sequence[InstanceStatus]) -> Iterator[Metric]:
        """One series a direction; a link that is up is there, with zeros if need be."""
        for field, (name, text) in LINK_COUNTERS.items():
            counter = CounterMetricFamily(f"flowkv_link_{name}", text, labels=["instance", "peer", "backend"])
            for status in statuses:
                for link in status.links:
                    counter.add_metric([status.name, link.peer, link.backend], getattr(link, field))
            yield counter
        for name, (text, value) in LINK_GAUGES.items():
            gauge = GaugeMetricFamily(f"flowkv_link_{name}", text, labels=["instance", "peer", "backend"])
            for status in statuses:
                for link in status.links:
                    gauge.add_metric([status.name, link.peer, link.backend], value(link))
            yield gauge
