from collections import defaultdict
from itertools import pairwise
from typing import Any

import msgspec

from flowkv.server.records.timeline import FRONTEND, PhaseName
from flowkv.server.records.trace import chrome_trace
from tests.server.records.test_timeline import ARRIVAL_S, split_request

RECORD = split_request().record(ARRIVAL_S + 9.0)


def test_it_is_what_the_viewers_read() -> None:
    """Slices of one row lie in each other or after each other, and all that they name is declared."""
    later = msgspec.structs.replace(RECORD, request_id="later", arrived_at=RECORD.arrived_at + 1.0)
    trace = msgspec.json.decode(msgspec.json.encode(chrome_trace([later, RECORD])))
    events: list[dict[str, Any]] = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(names.values()) == ["d", FRONTEND, "p"]
    rows: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(rows) == 6  # two requests on each process at a time
    for slices in rows.values():
        outer, *inner = slices
        assert all(outer[0] <= start and end <= outer[1] for start, end in inner)
        assert all(one[1] <= other[0] for one, other in pairwise(inner))


def test_each_phase_is_a_slice_of_who_measured_it() -> None:
    events = chrome_trace([RECORD])["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found = {event["name"]: (names[event["pid"]], event["ts"]) for event in events if event["ph"] == "X"}
    assert found[PhaseName.TRANSFER] == ("d", 2e6)
    assert found[PhaseName.PREFILL] == ("p", 1e6)
    assert found[PhaseName.DETOKENIZE] == (FRONTEND, 4.5e6)


def test_an_arrow_leads_from_the_prefill_to_the_decode() -> None:
    events = chrome_trace([RECORD])["traceEvents"]
    assert {event["ph"]: event["ts"] for event in events if event["ph"] in "sf"} == {"s": 2e6, "f": 2.75e6}


def test_of_nothing() -> None:
    assert chrome_trace([])["traceEvents"] == []
