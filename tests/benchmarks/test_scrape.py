import pytest

from benchmarks.scrape import difference, parse_counters
from flowkv.messages import ClusterStatus
from flowkv.metrics import FrontendMetrics
from flowkv.sim.figures import server_figures, totals
from flowkv.types import InstanceCounters, InstanceLoad, InstanceStatus, Role

PREFILL = InstanceCounters(
    num_steps=4, step_seconds=2.0, forward_seconds=1.5, sampling_seconds=0.3,
    transfer_bytes=4000, transfer_calls=2, transfer_seconds=0.5, transfer_exposed_seconds=0.1, num_transfers=1,
)  # fmt: skip


def page(**counters: InstanceCounters) -> str:
    statuses = [
        InstanceStatus(name=name, role=Role.PREFILL, num_blocks=8, block_size=16, load=InstanceLoad(), counters=counter)
        for name, counter in counters.items()
    ]
    status = ClusterStatus(True, None, 100, statuses)
    return FrontendMetrics(lambda: status).render().decode()


def test_counters_of_flowkvs_own_metrics_page() -> None:
    counters = parse_counters(page(p=PREFILL))
    assert counters["p", "transfer_bytes"] == 4000
    assert counters["p", "transfers"] == 1
    assert ("p", "blocks_used") not in counters


def test_difference_over_instances_old_and_new() -> None:
    before = parse_counters(page(p=PREFILL))
    after = parse_counters(page(p=PREFILL, q=PREFILL))
    assert difference(before, after)["transfer_bytes"] == 4000
    assert difference(before, before)["transfer_bytes"] == 0


def test_figures_of_the_server() -> None:
    figures = server_figures(difference({}, parse_counters(page(p=PREFILL))))
    assert figures["transfer_bytes_per_s"] == 8000
    assert figures["transfer_hidden_fraction"] == pytest.approx(0.8)
    assert figures["step_overhead_fraction"] == pytest.approx(0.1)


def test_a_server_that_moved_nothing_has_no_rate() -> None:
    assert "transfer_bytes_per_s" not in server_figures(difference({}, parse_counters(page(d=InstanceCounters()))))
    assert server_figures({}) == {}


def test_a_simulated_run_counts_under_the_names_of_the_metrics_page() -> None:
    scraped = difference({}, parse_counters(page(p=PREFILL, q=PREFILL)))
    assert totals([PREFILL, PREFILL]) == scraped
