from flowkv.server.records.history import Held
from flowkv.server.records.watch import ClusterWatch
from flowkv.types import InstanceCounters, InstanceLoad, LinkStatus
from tests.server.records.test_events import cluster, instance


def counted(tokens: int, steps: int) -> InstanceCounters:
    return InstanceCounters(prefill_tokens=tokens, decode_tokens=2 * tokens, num_steps=steps, step_seconds=steps / 10)


def test_rates_are_over_the_last_seconds() -> None:
    watch = ClusterWatch(0.0)
    for second in range(10):
        watch.observe(float(second), cluster(instance("d0", counters=counted(max(0, second - 5) * 100, second))))
    [row] = watch.rows()
    assert (row.prefill_tokens_per_s, row.decode_tokens_per_s) == (100.0, 200.0)
    assert row.step_s is not None and abs(row.step_s - 0.1) < 1e-9


def test_instances_are_in_the_order_of_their_numbers_however_long() -> None:
    watch = ClusterWatch(0.0)
    names = ["d2", "d10", "d10~1", "d" + "9" * 5000]
    watch.observe(0.0, cluster(*(instance(name) for name in reversed(names))))
    assert [row.name for row in watch.rows()] == names


def test_a_newcomer_has_no_rates() -> None:
    watch = ClusterWatch(0.0)
    watch.observe(0.0, cluster())
    watch.observe(1.0, cluster(instance("d0", counters=counted(100, 1))))
    assert watch.rows()[0].prefill_tokens_per_s is None
    watch.observe(2.0, cluster(instance("d0", counters=counted(150, 1))))
    [row] = watch.rows()
    assert row.prefill_tokens_per_s == 50.0 and row.step_s is None


def test_links_name_places_and_what_flows() -> None:
    def at(num_bytes: int) -> list[LinkStatus]:
        return [LinkStatus(peer="d0", backend="shm", num_bytes=num_bytes), LinkStatus(peer="dead", backend="shm")]

    watch = ClusterWatch(0.0)
    watch.observe(0.0, cluster(instance("p0", links=at(0)), instance("d0")))
    assert watch.rows()[1].links == [(0, "shm", 0.0)]
    watch.observe(2.0, cluster(instance("p0", links=at(500)), instance("d0")))
    assert watch.rows()[1].links == [(0, "shm", 250.0)]


def test_blocks_by_state_make_up_the_pool() -> None:
    load = InstanceLoad(free_blocks=3, used_blocks=5, reserved_blocks=3, quarantined_blocks=1)
    watch = ClusterWatch(0.0)
    watch.observe(0.0, cluster(instance("d0", load=load)))
    assert watch.rows()[0].blocks == {"filled": 2, "reserved": 2, "quarantined": 1, "free": 3}


def test_all_instances_together() -> None:
    watch = ClusterWatch(0.0)
    assert watch.held() == Held()
    busy = InstanceLoad(num_waiting=2, num_prefilling=1, num_decoding=4, used_blocks=4)
    watch.observe(0.0, cluster(instance("d0", load=busy), instance("d1", load=busy)))
    assert watch.held() == Held(waiting=4, running=10, used_fraction=0.5)


def test_instances_stand_by_number_and_a_successor_in_its_place() -> None:
    watch = ClusterWatch(0.0)
    names = ["prefill-0", "decode-10", "decode-2~1", "decode-1@node-1", "decode-1"]
    watch.observe(0.0, cluster(*map(instance, names)))
    assert [row.name for row in watch.rows()] == ["decode-1", "decode-1@node-1", "decode-2~1", "decode-10", "prefill-0"]
