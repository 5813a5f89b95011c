"""Every request's life as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open.

One process of the trace is one instance. A request has a slice on every instance that held it, with what it did there
inside: on the prefill instance its queueing and its chunks, on the decode instance its transfers and its decoding; an
arrow leads from one to the other. Requests that are on an instance at the same time lie in rows below each other.
Format: "Trace Event Format" of the Chromium project; times in microseconds of the virtual clock.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from flowkv.cluster.roles import Flip
from flowkv.sim.figures import Record, SimResult
from flowkv.sim.files import replaced


class Chunk(NamedTuple):
    """A part of a prompt, computed in one step."""

    instance: str
    start_s: float
    end_s: float
    num_tokens: int


class Moved(NamedTuple):
    """One write of a request's KV, while it moves."""

    source: str
    target: str
    start_s: float
    end_s: float
    num_bytes: int


class Recorder:
    """What the simulator tells beyond records, by index of the request in the workload.

    It is told in times of the simulator's clock, on which the run began at `origin_s`, and keeps those since then.
    """

    def __init__(self) -> None:
        self.origin_s = 0.0
        self.chunks: defaultdict[int, list[Chunk]] = defaultdict(list)
        self.moved: defaultdict[int, list[Moved]] = defaultdict(list)
        self._reserved: dict[tuple[str, int], int] = {}

    def chunk(self, index: int, instance: str, start_s: float, end_s: float, num_tokens: int) -> None:
        self.chunks[index].append(Chunk(instance, start_s - self.origin_s, end_s - self.origin_s, num_tokens))

    def reserved(self, index: int, target: str, immediate: int) -> None:
        """What is written to `target` under this immediate is of that request."""
        self._reserved[target, immediate] = index

    def write(self, source: str, target: str, immediate: int, start_s: float, end_s: float, num_bytes: int) -> None:
        moved = Moved(source, target, start_s - self.origin_s, end_s - self.origin_s, num_bytes)
        self.moved[self._reserved[target, immediate]].append(moved)


class _Slice(NamedTuple):
    name: str
    start_s: float
    end_s: float
    args: Mapping[str, object] = {}


class _Stay(NamedTuple):
    """A request on one instance: the outer slice, and what is inside."""

    instance: str
    outer: _Slice
    inner: list[_Slice]
    request: int
    arrow: tuple[str, float] | None = None  # "s": an arrow begins there, "f": one ends there; and when, s


def write_chrome_trace(path: Path, result: SimResult, recorder: Recorder) -> None:
    """One file, there whole or not at all."""
    stays = [stay for record in result.records for stay in _stays(record, recorder)]
    pids = {name: pid for pid, name in enumerate(sorted({stay.instance for stay in stays}), 1)}
    with replaced(path) as file:
        separator = b'{"displayTimeUnit":"ms","traceEvents":[\n'
        for event in _events(stays, pids, result.flips):
            file.write(separator + msgspec.json.encode(event))
            separator = b",\n"
        file.write(b"\n]}\n" if stays else separator + b"]}\n")


# --- a request's life ----------------------------------------------------------------------------------------------


def _stays(record: Record, recorder: Recorder) -> Iterator[_Stay]:
    """None for a request that was never placed, one where prefill and decode were in one place, else two."""
    if record.ttft_s is None or record.e2el_s is None or record.prefill_instance is None:
        return
    first_s, last_s = record.arrival_s + record.ttft_s, record.arrival_s + record.e2el_s
    prefill = list(_prefill_slices(record, recorder.chunks[record.index], first_s))
    decode = _Slice("decode", first_s, last_s, {"tokens": record.num_output_tokens})
    if record.decode_instance in (record.prefill_instance, None):
        outer = _outer(record, record.arrival_s, last_s)
        yield _Stay(record.prefill_instance, outer, [*prefill, decode], record.index)
        return
    moved = [move for move in recorder.moved[record.index] if move.target == record.decode_instance]
    writes = [_Slice("transfer", m.start_s, m.end_s, {"from": m.source, "bytes": m.num_bytes}) for m in moved]
    start_s = min([first_s, *(write.start_s for write in writes)])
    arrived_s = max([first_s, *(write.end_s for write in writes)])
    decode = decode._replace(start_s=min(arrived_s, last_s))
    yield _Stay(
        record.prefill_instance, _outer(record, record.arrival_s, first_s), prefill, record.index, ("s", first_s)
    )
    arrow = ("f", decode.start_s)
    outer = _outer(record, start_s, last_s)
    yield _Stay(record.decode_instance, outer, [*_apart(writes), decode], record.index, arrow)


def _outer(record: Record, start_s: float, end_s: float) -> _Slice:
    args = {
        "prompt tokens": record.num_prompt_tokens,
        "output tokens": record.num_output_tokens,
        "TTFT s": record.ttft_s,
        "TPOT s": record.tpot_s,
    }
    return _Slice(f"request {record.index}", start_s, end_s, args)


def _prefill_slices(record: Record, chunks: Sequence[Chunk], first_s: float) -> Iterator[_Slice]:
    """The wait for the first chunk and the chunks; where none are known, one slice for both."""
    mine = [chunk for chunk in chunks if chunk.instance == record.prefill_instance and chunk.start_s <= first_s]
    if not mine:
        yield _Slice("queue and prefill", record.arrival_s, first_s)
        return
    yield _Slice("queue", record.arrival_s, mine[0].start_s)
    for chunk in mine:
        yield _Slice("chunk", chunk.start_s, chunk.end_s, {"tokens": chunk.num_tokens})


def _apart(slices: Iterable[_Slice]) -> Iterator[_Slice]:
    """The same, each cut to begin after those before it: slices of one row must not overlap in part."""
    end_s = 0.0
    for one in sorted(slices, key=lambda s: s.start_s):
        if one.end_s > end_s:
            yield one._replace(start_s=max(one.start_s, end_s))
            end_s = one.end_s


# --- events of the format ------------------------------------------------------------------------------------------


def _events(stays: Sequence[_Stay], pids: Mapping[str, int], flips: Sequence[Flip]) -> Iterator[dict[str, Any]]:
    for name, pid in pids.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    for flip in flips:
        if flip.instance in pids:
            name = f"{flip.old} -> {flip.new} ({flip.regime})"
            yield {"ph": "i", "s": "p", "name": name, "pid": pids[flip.instance], "tid": 0, "ts": flip.time_s * 1e6}
    for stay, row in _rows(stays):
        place = {"pid": pids[stay.instance], "tid": row}
        for one in (stay.outer, *stay.inner):
            yield _complete(one) | place
        if stay.arrow is not None:
            end, at_s = stay.arrow
            yield ({"ph": end, "bp": "e", "cat": "handoff", "name": "handoff", "id": stay.request} | place | _at(at_s))


def _complete(one: _Slice) -> dict[str, Any]:
    seconds = max(0.0, one.end_s - one.start_s)
    return {"ph": "X", "name": one.name, "dur": seconds * 1e6, "args": one.args} | _at(one.start_s)


def _at(time_s: float) -> dict[str, float]:
    return {"ts": time_s * 1e6}


def _rows(stays: Iterable[_Stay]) -> Iterator[tuple[_Stay, int]]:
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
