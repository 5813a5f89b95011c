from typing import Any

import msgspec

from flowkv.messages import ClusterStatus
from flowkv.server.records.events import MAX_EVENTS, REGIME_S, RETURN_S, EventKind, EventLog
from flowkv.types import InstanceCounters, InstanceLoad, InstanceStatus, Regime, Role


def instance(name: str, role: Role = Role.DECODE, **changed: Any) -> InstanceStatus:
    status = InstanceStatus(
        name=name, role=role, num_blocks=8, block_size=16, load=InstanceLoad(), counters=InstanceCounters()
    )
    return msgspec.structs.replace(status, **changed)


def cluster(*instances: InstanceStatus, **changed: Any) -> ClusterStatus:
    return msgspec.structs.replace(ClusterStatus(True, None, 100, list(instances), controller="one"), **changed)


def events(*statuses: ClusterStatus) -> list[tuple[EventKind, str]]:
    """What the last of them brought."""
    log = EventLog(-1.0)
    for now_s, status in enumerate(statuses):
        log.observe(float(now_s), status)
    return [(event.kind, event.instance) for event in log.events if event.time_s == len(statuses) - 1]


def test_the_first_status_introduces_everybody() -> None:
    assert events(cluster(instance("p0"), instance("d0"))) == [
        (EventKind.READY, ""), (EventKind.JOINED, "p0"), (EventKind.JOINED, "d0"),
    ]  # fmt: skip


def test_the_same_again_is_no_event() -> None:
    assert events(cluster(instance("d0")), cluster(instance("d0"))) == []


def test_a_death_and_a_restart() -> None:
    before, after = cluster(instance("d0")), cluster(instance("d0~1"))
    assert events(before, after) == [(EventKind.GONE, "d0"), (EventKind.RESTARTED, "d0~1")]
    log = EventLog(-1.0)
    log.observe(0.0, after)
    assert log.events[-1].detail == "restart 1 of d0"


def test_one_that_was_drained_is_retired() -> None:
    draining = cluster(instance("d0", is_draining=True), instance("d1"))
    assert events(cluster(instance("d0"), instance("d1")), draining) == [(EventKind.DRAINING, "d0")]
    assert events(draining, cluster(instance("d1"))) == [(EventKind.RETIRED, "d0")]


def test_a_flip_has_both_roles() -> None:
    log = EventLog(-1.0)
    log.observe(0.0, cluster(instance("d0", Role.DECODE)))
    log.observe(1.0, cluster(instance("d0", Role.MIXED)))
    flip = log.events[-1]
    assert (flip.kind, flip.instance, flip.was, flip.role) == (EventKind.FLIP, "d0", Role.DECODE, Role.MIXED)


def test_stalled_and_heard_again() -> None:
    well, silent = cluster(instance("d0")), cluster(instance("d0", is_stalled=True))
    assert events(well, silent) == [(EventKind.STALLED, "d0")]
    assert events(silent, well) == [(EventKind.AWAKE, "d0")]


def test_the_cluster_itself() -> None:
    assert events(cluster(), cluster(ready=False)) == [(EventKind.NOT_READY, "")]
    assert events(cluster(ready=False), cluster()) == [(EventKind.READY, "")]
    assert events(cluster(num_lost=1), cluster(num_lost=3)) == [(EventKind.LOST, "")]


def test_a_regime_is_told_once_it_has_lasted() -> None:
    log = EventLog(-1.0)
    busy = {9.0: Regime.OVERLOADED, 9.5: Regime.NORMAL, 20.0: Regime.OVERLOADED, 20.0 + REGIME_S: Regime.OVERLOADED}
    for now_s, regime in busy.items():
        log.observe(now_s, cluster(regime=regime))
    told = [(event.time_s, event.detail) for event in log.events if event.kind is EventKind.REGIME]
    assert told == [(20.0, "normal to overloaded")]


def test_a_frontend_says_when_it_was_started() -> None:
    assert [event.kind for event in EventLog(5.0).events] == [EventKind.STARTED]


def test_another_controller_does_not_know_everybody_at_once() -> None:
    before = cluster(instance("p0"), instance("d0"), instance("d1"), num_lost=7)
    log = EventLog(-1.0)
    log.observe(0.0, before)
    log.events.clear()
    log.observe(1.0, cluster(controller="two"))
    log.observe(2.0, cluster(instance("p0"), instance("d0", Role.MIXED), controller="two"))
    log.observe(3.0, cluster(instance("p0"), instance("d0", Role.MIXED), instance("d1~1"), controller="two"))
    assert [(event.kind, event.instance) for event in log.events] == [
        (EventKind.CONTROLLER, ""), (EventKind.FLIP, "d0"), (EventKind.GONE, "d1"), (EventKind.RESTARTED, "d1~1"),
    ]  # fmt: skip


def test_who_does_not_come_back_to_another_controller_is_gone() -> None:
    log = EventLog(-1.0)
    log.observe(0.0, cluster(instance("d0")))
    log.observe(1.0, cluster(controller="two"))
    log.observe(0.9 + RETURN_S, cluster(controller="two"))
    assert "gone" not in [event.kind for event in log.events]
    log.observe(1.0 + RETURN_S, cluster(controller="two"))
    assert [event.kind for event in log.events][-2:] == [EventKind.CONTROLLER, EventKind.GONE]


def test_old_events_are_forgotten() -> None:
    log = EventLog(-1.0)
    for number in range(MAX_EVENTS):
        log.observe(float(number), cluster(instance("d0", is_stalled=bool(number % 2))))
    assert len(log.events) == MAX_EVENTS
    log.observe(1e9, cluster())
    assert len(log.events) == MAX_EVENTS and log.events[-1].kind is EventKind.GONE
