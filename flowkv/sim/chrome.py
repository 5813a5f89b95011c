"""Every request's life as a Chrome trace (`flowkv.chrome`), in times of the virtual clock.

A request has a slice on every instance that held it, with what it did there inside: on the prefill instance its
queueing and its chunks, on the decode instance its transfers and its decoding; an arrow leads from one to the other.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from flowkv.chrome import Mark, Slice, Stay, apart, trace_events
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


def write_chrome_trace(path: Path, result: SimResult, recorder: Recorder) -> None:
    """One file, there whole or not at all."""
    stays = [stay for record in result.records for stay in _stays(record, recorder)]
    marks = [Mark(flip.instance, f"{flip.old} -> {flip.new} ({flip.regime})", flip.time_s) for flip in result.flips]
    with replaced(path) as file:
        separator = b'{"displayTimeUnit":"ms","traceEvents":[\n'
        for event in trace_events(stays, marks):
            file.write(separator + msgspec.json.encode(event))
            separator = b",\n"
        file.write(b"\n]}\n" if stays else separator + b"]}\n")


def _stays(record: Record, recorder: Recorder) -> Iterator[Stay]:
    """None for a request that was never placed, one where prefill and decode were in one place, else two."""
    if record.ttft_s is None or record.e2el_s is None or record.prefill_instance is None:
        return
    first_s, last_s = record.arrival_s + record.ttft_s, record.arrival_s + record.e2el_s
    prefill = list(_prefill_slices(record, recorder.chunks[record.index], first_s))
    decode = Slice("decode", first_s, last_s, {"tokens": record.num_output_tokens})
    if record.decode_instance in (record.prefill_instance, None):
        outer = _outer(record, record.arrival_s, last_s)
        yield Stay(record.prefill_instance, outer, [*prefill, decode], record.index)
        return
    moved = [move for move in recorder.moved[record.index] if move.target == record.decode_instance]
    writes = [Slice("transfer", m.start_s, m.end_s, {"from": m.source, "bytes": m.num_bytes}) for m in moved]
    start_s = min([first_s, *(write.start_s for write in writes)])
    arrived_s = max([first_s, *(write.end_s for write in writes)])
    decode = decode._replace(start_s=min(arrived_s, last_s))
    yield Stay(
        record.prefill_instance, _outer(record, record.arrival_s, first_s), prefill, record.index, ("s", first_s)
    )
    arrow = ("f", decode.start_s)
    outer = _outer(record, start_s, last_s)
    yield Stay(record.decode_instance, outer, [*apart(writes), decode], record.index, arrow)


def _outer(record: Record, start_s: float, end_s: float) -> Slice:
    args = {
        "prompt tokens": record.num_prompt_tokens,
        "output tokens": record.num_output_tokens,
        "TTFT s": record.ttft_s,
        "TPOT s": record.tpot_s,
    }
    return Slice(f"request {record.index}", start_s, end_s, args)


def _prefill_slices(record: Record, chunks: Sequence[Chunk], first_s: float) -> Iterator[Slice]:
    """The wait for the first chunk and the chunks; where none are known, one slice for both."""
    mine = [chunk for chunk in chunks if chunk.instance == record.prefill_instance and chunk.start_s <= first_s]
    if not mine:
        yield Slice("queue and prefill", record.arrival_s, first_s)
        return
    yield Slice("queue", record.arrival_s, mine[0].start_s)
    for chunk in mine:
        yield Slice("chunk", chunk.start_s, chunk.end_s, {"tokens": chunk.num_tokens})
