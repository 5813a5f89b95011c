"""Chrome's Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open.

One process of the trace is one process or instance of the cluster. Requests that are on it at the same time lie in rows
below each other, each an outer slice with what it did there inside. Format: "Trace Event Format" of the Chromium
project; times in microseconds.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Slice(NamedTuple):
    name: str
    start_s: float
    end_s: float
    args: Mapping[str, object] = {}


class Stay(NamedTuple):
    """A request on one instance: the outer slice, and what is inside."""

    instance: str
    outer: Slice
    inner: list[Slice]
    request: int | str
    arrow: tuple[str, float] | None = None  # "s": an arrow begins there, "f": one ends there; and when, s


class Mark(NamedTuple):
    """Something that happened on an instance at one moment."""

    instance: str
    name: str
    time_s: float


def trace_events(stays: Sequence[Stay], marks: Sequence[Mark] = ()) -> Iterator[dict[str, Any]]:
    """Marks of instances that no request was on are left out."""
    pids = {name: pid for pid, name in enumerate(sorted({stay.instance for stay in stays}), 1)}
    for name, pid in pids.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    for mark in marks:
        if mark.instance in pids:
            yield {"ph": "i", "s": "p", "name": mark.name, "pid": pids[mark.instance], "tid": 0} | _at(mark.time_s)
    for stay, row in _rows(stays):
        place = {"pid": pids[stay.instance], "tid": row}
        for one in (stay.outer, *stay.inner):
            yield _complete(one) | place
        if stay.arrow is not None:
            end, at_s = stay.arrow
            yield ({"ph": end, "bp": "e", "cat": "handoff", "name": "handoff", "id": stay.request} | place | _at(at_s))


def apart(slices: Iterable[Slice]) -> Iterator[Slice]:
    """The same, each cut to begin after those before it: slices of one row must not overlap in part."""
    end_s = 0.0
    for one in sorted(slices, key=lambda s: s.start_s):
        if one.end_s > end_s:
            yield one._replace(start_s=max(one.start_s, end_s))
            end_s = one.end_s


def _complete(one: Slice) -> dict[str, Any]:
    seconds = max(0.0, one.end_s - one.start_s)
    return {"ph": "X", "name": one.name, "dur": seconds * 1e6, "args": one.args} | _at(one.start_s)


def _at(time_s: float) -> dict[str, float]:
    return {"ts": time_s * 1e6}


def _rows(stays: Iterable[Stay]) -> Iterator[tuple[Stay, int]]:
    """(stay, row within its instance): the first row that is free from its start on."""
    free: defaultdict[str, list[int]] = defaultdict(list)
    busy: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for stay in sorted(stays, key=lambda stay: stay.outer.start_s):
        rows, ends = free[stay.instance], busy[stay.instance]
        while ends and ends[0][0] <= stay.outer.start_s:
            heapq.heappush(rows, heapq.heappop(ends)[1])
        row = heapq.heappop(rows) if rows else len(ends) + 1
        heapq.heappush(ends, (stay.outer.end_s, row))
        yield stay, row
