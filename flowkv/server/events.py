"""What has happened to a cluster, told from one `ClusterStatus` to the next."""

from collections import deque
from collections.abc import Iterator
from enum import StrEnum

import msgspec

from flowkv.messages import RESTART_MARK, ClusterStatus
from flowkv.types import InstanceStatus, Role

MAX_EVENTS = 200


class EventKind(StrEnum):
    READY = "ready"  # of the cluster
    NOT_READY = "not_ready"
    REGIME = "regime"
    JOINED = "joined"  # of an instance
    RESTARTED = "restarted"  # it takes the place of one that ended
    GONE = "gone"
    RETIRED = "retired"  # gone, after it was drained
    FLIP = "flip"
    STALLED = "stalled"
    AWAKE = "awake"
    DRAINING = "draining"


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`time_s` is the frontend's clock; `instance` is empty where the whole cluster is meant."""

    time_s: float
    kind: EventKind
    instance: str = ""
    role: Role | None = None  # of the instance, from now on (or to its end)
    was: Role | None = None  # before a flip
    detail: str = ""


class EventLog:
    """The last `MAX_EVENTS`, oldest first."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._last: ClusterStatus | None = None

    def observe(self, now_s: float, status: ClusterStatus) -> None:
        self.events.extend(_changes(now_s, self._last, status))
        self._last = status


def _changes(now_s: float, before: ClusterStatus | None, after: ClusterStatus) -> Iterator[Event]:
    old = {} if before is None else {instance.name: instance for instance in before.instances}
    new = {instance.name: instance for instance in after.instances}
    for name in old.keys() - new.keys():
        yield _departure(now_s, old[name])
    for name, instance in new.items():
        if name in old:
            yield from _differences(now_s, old[name], instance)
        else:
            yield _arrival(now_s, instance)
    if after.ready != (before is not None and before.ready):
        yield Event(time_s=now_s, kind=EventKind.READY if after.ready else EventKind.NOT_READY)
    if before is not None and after.regime is not before.regime:
        yield Event(time_s=now_s, kind=EventKind.REGIME, detail=f"{before.regime} to {after.regime}")


def _arrival(now_s: float, instance: InstanceStatus) -> Event:
    seat, mark, epoch = instance.name.rpartition(RESTART_MARK)
    kind, detail = (EventKind.RESTARTED, f"restart {epoch} of {seat}") if mark else (EventKind.JOINED, "")
    return Event(time_s=now_s, kind=kind, instance=instance.name, role=instance.role, detail=detail)


def _departure(now_s: float, instance: InstanceStatus) -> Event:
    kind = EventKind.RETIRED if instance.is_draining else EventKind.GONE
    return Event(time_s=now_s, kind=kind, instance=instance.name, role=instance.role)


def _differences(now_s: float, old: InstanceStatus, new: InstanceStatus) -> Iterator[Event]:
    kinds = []
    if new.role is not old.role:
        kinds.append(EventKind.FLIP)
    if new.is_stalled is not old.is_stalled:
        kinds.append(EventKind.STALLED if new.is_stalled else EventKind.AWAKE)
    if new.is_draining and not old.is_draining:
        kinds.append(EventKind.DRAINING)
    for kind in kinds:
        was = old.role if kind is EventKind.FLIP else None
        yield Event(time_s=now_s, kind=kind, instance=new.name, role=new.role, was=was)
