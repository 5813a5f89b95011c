"""A cluster as its dashboard shows it: each instance with its rates, and what has happened. Pure."""

import re
from collections import deque
from typing import NamedTuple

import msgspec

from flowkv.messages import ClusterStatus
from flowkv.server.records.events import Event, EventLog
from flowkv.server.records.history import Held
from flowkv.server.records.rates import Rates
from flowkv.types import InstanceLoad, InstanceStatus, Role

_LOOKS = 4  # kept: rates are over the seconds between the first and the last
_LOOK_S = 1.0


LinkRow = tuple[int, str, float]  # to the instance at that place of the list: by which backend, bytes a second


class InstanceRow(msgspec.Struct, frozen=True, kw_only=True):
    """`blocks` by state; their sum is the pool."""

    name: str
    role: Role
    is_stalled: bool
    is_draining: bool
    num_flips: int
    waiting: int
    prefilling: int
    decoding: int
    sending: int
    receiving: int
    preempted: int
    waiting_tokens: int
    blocks: dict[str, int]
    prefill_tokens_per_s: float | None = None  # None: not known yet
    decode_tokens_per_s: float | None = None
    step_s: float | None = None
    links: list[LinkRow] = []


class _Look(NamedTuple):
    time_s: float
    instances: dict[str, InstanceStatus]


class ClusterWatch:
    """Told of every `ClusterStatus`."""

    def __init__(self, now_s: float) -> None:
        self._log = EventLog(now_s)
        self._looks: deque[_Look] = deque(maxlen=_LOOKS)
        self._latest = _Look(0.0, {})

    @property
    def events(self) -> list[Event]:
        return list(self._log.events)

    def observe(self, now_s: float, status: ClusterStatus) -> None:
        self._log.observe(now_s, status)
        in_order = sorted(status.instances, key=lambda instance: _by_number(instance.name))
        self._latest = _Look(now_s, {instance.name: instance for instance in in_order})
        if not self._looks or now_s - self._looks[-1].time_s >= _LOOK_S:
            self._looks.append(self._latest)

    def held(self) -> Held:
        """By all instances together."""
        instances = self._latest.instances.values()
        num_blocks = sum(instance.num_blocks for instance in instances)
        return Held(
            waiting=sum(instance.load.num_waiting for instance in instances),
            running=sum(instance.load.num_prefilling + instance.load.num_decoding for instance in instances),
            used_fraction=sum(instance.load.used_blocks for instance in instances) / num_blocks if num_blocks else 0.0,
        )

    def rows(self) -> list[InstanceRow]:
        places = {name: place for place, name in enumerate(self._latest.instances)}
        return [self._row(status, places) for status in self._latest.instances.values()]

    def _row(self, status: InstanceStatus, places: dict[str, int]) -> InstanceRow:
        look = next((look for look in self._looks if status.name in look.instances), self._latest)
        before, elapsed_s = look.instances[status.name], self._latest.time_s - look.time_s
        rates = Rates.between(before, status, elapsed_s) if elapsed_s > 0 else None
        load = status.load
        return InstanceRow(
            name=status.name, role=status.role, is_stalled=status.is_stalled, is_draining=status.is_draining,
            num_flips=status.num_flips, waiting=load.num_waiting, prefilling=load.num_prefilling,
            decoding=load.num_decoding, sending=load.num_sending, receiving=load.num_receiving,
            preempted=load.num_preempted, waiting_tokens=load.waiting_tokens + load.deferred_tokens,
            blocks=_blocks(load),
            prefill_tokens_per_s=None if rates is None else rates.prefill_tokens_per_s,
            decode_tokens_per_s=None if rates is None else rates.decode_tokens_per_s,
            step_s=None if rates is None else rates.step_s,
            links=_links(before, status, elapsed_s, places),
        )  # fmt: skip


def _by_number(name: str) -> list[tuple[int, str]]:
    """decode-2 comes before decode-10, and one that was restarted stays in its place."""
    return [(len(part), part) if place % 2 else (0, part) for place, part in enumerate(re.split(r"([0-9]+)", name))]


def _links(before: InstanceStatus, after: InstanceStatus, elapsed_s: float, places: dict[str, int]) -> list[LinkRow]:
    """One pass and no more: of 64 instances there are 4,032."""
    old = {link.peer: link.num_bytes for link in before.links}
    per_s = 1 / elapsed_s if elapsed_s > 0 else 0.0
    return [
        (places[link.peer], link.backend, (link.num_bytes - old.get(link.peer, 0)) * per_s)
        for link in after.links
        if link.peer in places
    ]


def _blocks(load: InstanceLoad) -> dict[str, int]:
    """`filled` are those that hold the KV of a request, `reserved` those that a peer is to fill or is filling."""
    return {
        "filled": load.used_blocks - load.reserved_blocks,
        "reserved": load.reserved_blocks - load.quarantined_blocks,
        "quarantined": load.quarantined_blocks,
        "free": load.free_blocks,
    }
