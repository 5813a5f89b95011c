import msgspec
from prometheus_client.parser import text_string_to_metric_families

from flowkv.cluster_metrics import COUNTERS, LOAD_GAUGES
from flowkv.messages import ClusterStatus
from flowkv.metrics import FrontendMetrics
from flowkv.types import (
    FinishReason,
    InstanceCounters,
    InstanceLoad,
    InstanceStatus,
    LinkStatus,
    ProcessUsage,
    Regime,
    Role,
)


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


def cluster(*statuses: InstanceStatus, regime: Regime = Regime.NORMAL, num_refused: int = 0) -> ClusterStatus:
    return ClusterStatus(True, None, 100, list(statuses), regime, num_refused=num_refused)


def labels(**pairs: str) -> frozenset[tuple[str, str]]:
    return frozenset(pairs.items())


def test_every_field_of_load_and_counters_is_exported() -> None:
    assert set(LOAD_GAUGES) == set(InstanceLoad.__struct_fields__)
    assert set(COUNTERS) == set(InstanceCounters.__struct_fields__)


def test_instances_are_exported_as_they_last_reported() -> None:
    shown = cluster(status("d0.1", transfer_bytes=1000, num_steps=7, transfer_exposed_seconds=0.5))
    found = samples(FrontendMetrics(lambda: shown))
    d0, total = labels(instance="d0.1", role="decode"), labels(instance="d0.1")
    assert found["flowkv_instance_decoding", d0] == 3
    assert found["flowkv_instance_blocks_used", d0] == 4
    assert found["flowkv_instance_blocks_reserved", d0] == 1
    assert found["flowkv_instance_blocks_total", d0] == 64
    assert found["flowkv_instance_transfer_bytes_total", total] == 1000
    assert found["flowkv_instance_steps_total", total] == 7
    assert found["flowkv_instance_transfer_exposed_seconds_total", total] == 0.5


def test_stalled_and_draining_instances_are_shown() -> None:
    shown = [
        status("d0"),
        msgspec.structs.replace(status("d1"), is_stalled=True),
        msgspec.structs.replace(status("d2"), is_draining=True),
    ]
    found = samples(FrontendMetrics(lambda: cluster(*shown)))

    def flags(name: str) -> list[float]:
        return [found[f"flowkv_instance_{name}", labels(instance=f"d{i}", role="decode")] for i in range(3)]

    assert flags("stalled") == [0, 1, 0]
    assert flags("draining") == [0, 0, 1]


def test_a_restarted_instance_starts_a_new_series() -> None:
    shown = cluster(status("d0.1", num_steps=7))
    metrics = FrontendMetrics(lambda: shown)
    assert samples(metrics)["flowkv_instance_steps_total", labels(instance="d0.1")] == 7
    shown = cluster(status("d0.2", num_steps=1))
    found = samples(metrics)
    assert found["flowkv_instance_steps_total", labels(instance="d0.2")] == 1
    assert ("flowkv_instance_steps_total", labels(instance="d0.1")) not in found


def test_a_change_of_role_ends_the_gauges_of_the_old_one_and_goes_on_with_the_totals() -> None:
    shown = cluster(status("d0", num_steps=7))
    metrics = FrontendMetrics(lambda: shown)
    before = samples(metrics)
    shown = cluster(msgspec.structs.replace(status("d0", num_steps=9), role=Role.PREFILL, num_flips=1))
    after = samples(metrics)
    assert ("flowkv_instance_decoding", labels(instance="d0", role="decode")) not in after
    assert after["flowkv_instance_decoding", labels(instance="d0", role="prefill")] == 3
    totals = [found["flowkv_instance_steps_total", labels(instance="d0")] for found in (before, after)]
    flips = [found["flowkv_role_flips_total", labels(instance="d0")] for found in (before, after)]
    assert (totals, flips) == ([7, 9], [0, 1])


def test_the_regime_and_what_admission_refused() -> None:
    found = samples(FrontendMetrics(lambda: cluster(regime=Regime.OVERLOADED, num_refused=3)))
    regimes = {regime for regime in Regime if found["flowkv_cluster_regime", labels(regime=regime)]}
    assert regimes == {Regime.OVERLOADED}
    assert found["flowkv_requests_refused_by_admission_total", labels()] == 3


def test_a_cluster_that_nobody_knows_yet_has_no_series() -> None:
    assert not [name for name, _ in samples(FrontendMetrics(lambda: None)) if "instance" in name or "regime" in name]


def test_frontend_metrics_count() -> None:
    metrics = FrontendMetrics(lambda: None)
    metrics.ttft_s.observe(0.2)
    metrics.itl_s.observe(0.02)
    metrics.e2e_s.observe(1.5)
    metrics.count_finished(FinishReason.LENGTH)
    metrics.count_refused(404, "model_not_found")
    found = samples(metrics)
    assert found["flowkv_ttft_seconds_sum", labels()] == 0.2
    assert found["flowkv_itl_seconds_bucket", labels(le="0.02")] == 1
    assert found["flowkv_e2e_seconds_count", labels()] == 1
    assert found["flowkv_choices_finished_total", labels(finish_reason="length")] == 1
    assert found["flowkv_choices_finished_total", labels(finish_reason="stop")] == 0
    assert found["flowkv_requests_refused_total", labels(status="404")] == 1
    assert found["flowkv_rejections_total", labels(reason="model_not_found")] == 1


def test_processes_are_exported_by_their_place() -> None:
    usage = ProcessUsage(resident_bytes=1 << 20, open_files=12, cpu_seconds=1.5, num_restarts=2)
    shown = msgspec.structs.replace(cluster(), processes={"controller": usage})
    found = samples(FrontendMetrics(lambda: shown))
    place = labels(process="controller")
    assert found["flowkv_process_resident_bytes", place] == 1 << 20
    assert found["flowkv_process_open_files", place] == 12
    assert found["flowkv_process_cpu_seconds_total", place] == 1.5
    assert found["flowkv_process_restarts_total", place] == 2


def test_a_link_is_compared_with_the_best_that_it_has_done() -> None:
    fast = LinkStatus(peer="p1", backend="shm", num_bytes=600, seconds=3.0, best_bytes_per_s=400.0)
    new = LinkStatus(peer="p2", backend="shm")
    found = samples(FrontendMetrics(lambda: cluster(msgspec.structs.replace(status("p0"), links=[fast, new]))))
    by_peer = {peer: labels(instance="p0", peer=peer, backend="shm") for peer in ("p1", "p2")}
    assert found["flowkv_link_line_rate_fraction", by_peer["p1"]] == 0.5
    assert found["flowkv_link_line_rate_fraction", by_peer["p2"]] == 0.0


class _Phase(msgspec.Struct):
    name: str
    seconds: float


class _Ended(msgspec.Struct):
    phases: list[_Phase]
    tpot_s: float | None = 0.05
    unaccounted_s: float = 0.25
    prompt_tokens: int = 100
    output_tokens: int = 10


def test_a_request_that_ended_counts_in_every_phase() -> None:
    metrics = FrontendMetrics(lambda: None)
    metrics.count_ended(_Ended([_Phase("queued", 0.5), _Phase("prefill", 2.0)]))
    metrics.count_ended(_Ended([_Phase("queued", 1.5)], tpot_s=None))
    found = samples(metrics)
    assert found["flowkv_phase_seconds_sum", labels(phase="queued")] == 2.0
    assert found["flowkv_phase_seconds_count", labels(phase="prefill")] == 1
    assert found["flowkv_phase_seconds_sum", labels(phase="unaccounted")] == 0.5
    assert found["flowkv_request_prompt_tokens_bucket", labels(le="256.0")] == 2
    assert found["flowkv_request_output_tokens_sum", labels()] == 20
    assert found["flowkv_tpot_seconds_count", labels()] == 1
