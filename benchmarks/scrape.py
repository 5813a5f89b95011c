"""What the server counted during a run, from `/metrics` before and after."""

import time
from collections import defaultdict

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import BenchmarkError

PREFIX = "flowkv_instance_"
SETTLE_INTERVAL_S = 1.25  # an idle instance reports once a second
SETTLE_TIMEOUT_S = 10.0

Counters = dict[tuple[str, str], float]  # (instance, counter without prefix and "_total"): value


def parse_counters(text: str) -> Counters:
    """The counters of every instance in a Prometheus text page."""
    return {
        (sample.labels["instance"], family.name.removeprefix(PREFIX)): sample.value
        for family in text_string_to_metric_families(text)
        if family.type == "counter" and family.name.startswith(PREFIX)
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def read_counters(url: str) -> Counters:
    """Empty for a server that has none of FlowKV's counters. Raises BenchmarkError where there is no `/metrics`."""
    try:
        answer = httpx.get(f"{url}/metrics", timeout=10.0)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise BenchmarkError(f"{url}/metrics: {error}") from error
    return parse_counters(answer.text)


def settled_counters(url: str) -> Counters:
    """The counters once an idle server's instances have all reported: when two readings in a row agree."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    counters = read_counters(url)
    while time.monotonic() < deadline_s:
        time.sleep(SETTLE_INTERVAL_S)
        again = read_counters(url)
        if again == counters:
            break
        counters = again
    return counters


def difference(before: Counters, after: Counters) -> dict[str, float]:
    """What was counted in between, over all instances; one that has started since counts from zero."""
    totals: dict[str, float] = defaultdict(float)
    for (instance, name), value in after.items():
        totals[name] += value - before.get((instance, name), 0.0)
    return dict(totals)


def add(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in left.keys() | right.keys()}
