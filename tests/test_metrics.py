import msgspec
from prometheus_client.parser import text_string_to_metric_families

from flowkv.metrics import COUNTERS, LOAD_GAUGES, FrontendMetrics
from flowkv.types import FinishReason, InstanceCounters, InstanceLoad, InstanceStatus, Role


def samples(metrics: FrontendMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def status(name: str, **counters: float) -> InstanceStatus:
    return InstanceStatus(
        name=name,
        role=Role.DECODE,
        num_blocks=64,
        block_size=16,
        load=InstanceLoad(num_decoding=3, free_blocks=60, used_blocks=4, reserved_blocks=1),
        counters=InstanceCounters(**counters),  # type: ignore[arg-type]
    )


def labels(**pairs: str) -> frozenset[tuple[str, str]]:
    return frozenset(pairs.items())


def test_every_field_of_load_and_counters_is_exported() -> None:
    assert set(LOAD_GAUGES) == set(InstanceLoad.__struct_fields__)
    assert set(COUNTERS) == set(InstanceCounters.__struct_fields__)


def test_instances_are_exported_as_they_last_reported() -> None:
    statuses = [status("d0.1", transfer_bytes=1000, num_steps=7, transfer_exposed_seconds=0.5)]
    metrics = FrontendMetrics(lambda: statuses)
    d0 = labels(instance="d0.1", role="decode")
    found = samples(metrics)
    assert found["flowkv_instance_decoding", d0] == 3
    assert found["flowkv_instance_blocks_used", d0] == 4
    assert found["flowkv_instance_blocks_reserved", d0] == 1
    assert found["flowkv_instance_blocks_total", d0] == 64
    assert found["flowkv_instance_transfer_bytes_total", d0] == 1000
    assert found["flowkv_instance_steps_total", d0] == 7
    assert found["flowkv_instance_transfer_exposed_seconds_total", d0] == 0.5


def test_a_stalled_instance_is_shown() -> None:
    statuses = [status("d0"), msgspec.structs.replace(status("d1"), is_stalled=True)]
    found = samples(FrontendMetrics(lambda: statuses))
    stalled = [found["flowkv_instance_stalled", labels(instance=name, role="decode")] for name in ("d0", "d1")]
    assert stalled == [0, 1]


def test_a_restarted_instance_starts_a_new_series() -> None:
    statuses = [status("d0.1", num_steps=7)]
    metrics = FrontendMetrics(lambda: statuses)
    assert samples(metrics)["flowkv_instance_steps_total", labels(instance="d0.1", role="decode")] == 7
    statuses[:] = [status("d0.2", num_steps=1)]
    found = samples(metrics)
    assert found["flowkv_instance_steps_total", labels(instance="d0.2", role="decode")] == 1
    assert ("flowkv_instance_steps_total", labels(instance="d0.1", role="decode")) not in found


def test_frontend_metrics_count() -> None:
    metrics = FrontendMetrics(list)
    metrics.ttft_s.observe(0.2)
    metrics.itl_s.observe(0.02)
    metrics.e2e_s.observe(1.5)
    metrics.count_finished(FinishReason.LENGTH)
    metrics.count_refused(404)
    found = samples(metrics)
    assert found["flowkv_ttft_seconds_sum", labels()] == 0.2
    assert found["flowkv_itl_seconds_bucket", labels(le="0.02")] == 1
    assert found["flowkv_e2e_seconds_count", labels()] == 1
    assert found["flowkv_choices_finished_total", labels(finish_reason="length")] == 1
    assert found["flowkv_choices_finished_total", labels(finish_reason="stop")] == 0
    assert found["flowkv_requests_refused_total", labels(status="404")] == 1
