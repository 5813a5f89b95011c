"""Requests that have ended as a Chrome trace (`flowkv.chrome`): a process for the frontend and for each instance."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from flowkv.chrome import Slice, Stay, apart, trace_events
from flowkv.server.records.timeline import FRONTEND, Phase, PhaseName, RequestRecord


def chrome_trace(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Time 0 is the arrival of the first of them; when that was is in `otherData`."""
    origin_at = min((record.arrived_at for record in records), default=0.0)
    stays = [stay for record in records for stay in _stays(record, record.arrived_at - origin_at)]
    return {
        "displayTimeUnit": "ms",
        "otherData": {"origin_unix_s": origin_at},
        "traceEvents": list(trace_events(stays)),
    }


def _stays(record: RequestRecord, arrival_s: float) -> Iterator[Stay]:
    """On the frontend as long as it was there at all, and on each instance in each attempt."""
    args = {
        name: value
        for name, value in (
            ("state", record.state), ("finish_reason", record.finish_reason), ("error", record.error),
            ("prompt_tokens", record.prompt_tokens), ("output_tokens", record.output_tokens),
            ("ttft_s", record.ttft_s), ("tpot_s", record.tpot_s), ("unaccounted_s", record.unaccounted_s),
        )
        if value is not None
    }  # fmt: skip
    outer = Slice(record.request_id, arrival_s, arrival_s + record.elapsed_s, args)
    mine = [phase for phase in record.phases if phase.where == FRONTEND]
    yield Stay(FRONTEND, outer, list(apart(_slices(mine, arrival_s))), record.request_id)
    theirs = sorted((p for p in record.phases if p.where != FRONTEND), key=lambda p: (p.attempt, p.where))
    split = {p.attempt for p in theirs if p.name is PhaseName.RESERVED}
    for (attempt, instance), group in groupby(theirs, key=lambda p: (p.attempt, p.where)):
        inner = list(apart(_slices(group, arrival_s)))
        inside = Slice(record.request_id, inner[0].start_s, max(s.end_s for s in inner), {"attempt": attempt})
        arrow = _arrow(inner) if attempt in split else None
        yield Stay(instance, inside, inner, f"{record.request_id}/{attempt}", arrow)


def _slices(phases: Iterable[Phase], arrival_s: float) -> Iterator[Slice]:
    for phase in phases:
        start_s = arrival_s + phase.start_s
        yield Slice(phase.name, start_s, start_s + phase.seconds)


def _arrow(inner: Sequence[Slice]) -> tuple[str, float]:
    """From the end of the prefill to the beginning of the decode."""
    for one in inner:
        if one.name == PhaseName.PREFILL:
            return ("s", one.end_s)
    return ("f", inner[-1].start_s)
