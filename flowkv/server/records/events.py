"""What has happened to a cluster, told from one `ClusterStatus` to the next."""

from collections import deque
from collections.abc import Iterator, Mapping
from enum import StrEnum

import msgspec

from flowkv.messages import RESTART_MARK, ClusterStatus, seat_of
from flowkv.types import InstanceStatus, Regime, Role

MAX_EVENTS = 200
RETURN_S = 10.0  # a controller that was started again is not asked before about instances that it does not know yet

REGIME_S = 3.0  # a regime that lasts less is none


class EventKind(StrEnum):
    STARTED = "started"  # this frontend
    CONTROLLER = "controller"  # was started again
    READY = "ready"  # of the cluster
    NOT_READY = "not_ready"
    REGIME = "regime"
    LOST = "lost"  # attempts, with their instance
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

    def __init__(self, now_s: float) -> None:
        self.events: deque[Event] = deque([Event(time_s=now_s, kind=EventKind.STARTED)], maxlen=MAX_EVENTS)
        self._last = ClusterStatus(False, None, 0, [])
        self._known: dict[str, InstanceStatus] = {}  # those that are there, as far as is known
        self._returned_by_s = now_s  # until then nobody is missed
        self._regime = self._told_regime = Regime.NORMAL
        self._regime_since_s = now_s

    def observe(self, now_s: float, status: ClusterStatus) -> None:
        if self._last.controller not in ("", status.controller):
            self._returned_by_s = now_s + RETURN_S
            self.events.append(Event(time_s=now_s, kind=EventKind.CONTROLLER))
        self.events.extend(_of_cluster(now_s, self._last, status))
        self.events.extend(self._of_regime(now_s, status.regime))
        self.events.extend(self._of_instances(now_s, {instance.name: instance for instance in status.instances}))
        self._last = status

    def _of_regime(self, now_s: float, regime: Regime) -> Iterator[Event]:
        if regime is not self._regime:
            self._regime, self._regime_since_s = regime, now_s
        if regime is not self._told_regime and now_s - self._regime_since_s >= REGIME_S:
            yield Event(time_s=self._regime_since_s, kind=EventKind.REGIME, detail=f"{self._told_regime} to {regime}")
            self._told_regime = regime

    def _of_instances(self, now_s: float, new: Mapping[str, InstanceStatus]) -> Iterator[Event]:
        replaced = {seat_of(name) for name in new.keys() - self._known.keys()}
        for name in list(self._known.keys() - new.keys()):
            if now_s >= self._returned_by_s or seat_of(name) in replaced:
                yield _departure(now_s, self._known.pop(name))
        for name, instance in new.items():
            if name in self._known:
                yield from _differences(now_s, self._known[name], instance)
            else:
                yield _arrival(now_s, instance)
        self._known.update(new)


def _of_cluster(now_s: float, before: ClusterStatus, after: ClusterStatus) -> Iterator[Event]:
    if after.ready is not before.ready:
        yield Event(time_s=now_s, kind=EventKind.READY if after.ready else EventKind.NOT_READY)
    if after.controller == before.controller and after.num_lost > before.num_lost:
        yield Event(time_s=now_s, kind=EventKind.LOST, detail=str(after.num_lost - before.num_lost))


def _arrival(now_s: float, instance: InstanceStatus) -> Event:
    seat, mark, epoch = instance.name.partition(RESTART_MARK)
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
