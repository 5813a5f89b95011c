"""What is told of a run: the JSON, the table, the pictures and the Chrome trace."""

import io
import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from flowkv.errors import ConfigError
from flowkv.sim import plots, report
from flowkv.sim.chrome import Recorder, write_chrome_trace
from flowkv.sim.figures import Distribution, Record, Sample, SimResult, Slo
from flowkv.sim.files import replaced
from flowkv.types import Regime
from tests.sim.results import handed_over, result, stayed

SLO = Slo(ttft_s=0.75, tpot_s=1.0)


# --- JSON ----------------------------------------------------------------------------------------------------------


def test_summary_has_figures_and_counters() -> None:
    found = report.summary(result(), SLO)
    assert (found["num_requests"], found["num_refused"], found["num_flips"], found["errors"]) == (4, 1, 1, ["no room"])
    assert found["good_fraction"] == 0.25
    assert (found["server"]["steps"], found["server"]["transfer_bytes_per_s"]) == (10, 8000)


def test_json_has_a_line_for_each_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    run = result()
    report.write_json(path, {"flips": run.flips, "requests": report.request_columns(run.records)})
    assert len(path.read_text().splitlines()) == 4
    written = json.loads(path.read_text())
    assert written["flips"] == [[3.0, "decode-0", "decode", "prefill", "imbalanced"]]
    assert written["requests"]["ttft_s"] == [1.0, 1.0, 0.5, None]
    assert written["requests"]["tpot_s"] == [0.5, 0.5, 0.5, None]


def test_what_fails_half_way_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {"new": 2, "no json": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"file/report.json: cannot be written"),
        replaced(tmp_path / "file/report.json"),
    ):
        pass


# --- the table -----------------------------------------------------------------------------------------------------


def printed(run: SimResult, slo: Slo = SLO) -> str:
    out = io.StringIO()
    report.print_summary(Console(file=out, width=100), "a run", report.summary(run, slo), slo, ["one note"])
    return out.getvalue()


def test_the_table() -> None:
    text = printed(result())
    assert text.split("TTFT")[1].split()[:4] == ["833.3", "1000.0", "1000.0", "1000.0"]
    assert text.split("E2EL")[1].split()[0] == "2500.0"
    assert "4 requests in 4.0 s: 0.75 requests/s, 3.2 output tokens/s, 0 errors, 1 refused" in text
    assert "goodput 0.25 requests/s (25.0% within the SLO)" in text
    assert "one note" in text and "error: no room" in text
    assert "goodput" not in printed(result(), Slo())


def test_a_run_that_refused_everything_can_be_told() -> None:
    refused = SimResult([Record(0, 0.0, 10, 0, error="no room", is_refused=True)], Distribution(), 0.0)
    assert "1 refused" in printed(refused) and "TTFT" not in printed(refused)


# --- pictures ------------------------------------------------------------------------------------------------------


def test_plots_are_written(tmp_path: Path) -> None:
    paths = plots.write_plots(tmp_path / "out", result(), SLO)
    assert [path.name for path in paths] == ["load.png", "latency.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)


def test_the_load_has_a_line_for_each_instance_and_their_sum() -> None:
    queue, decoding, used, roles = plots.load_figure(result()).axes
    assert [list(line.get_ydata()) for line in queue.lines] == [[900] * 5, [0] * 4, [900] * 5]  # type: ignore[arg-type]
    assert list(decoding.lines[1].get_xdata()) == [0, 1, 2, 3]  # type: ignore[arg-type]  # retired after that
    assert list(used.lines[2].get_ydata()) == [37.5] * 4 + [25.0]  # type: ignore[arg-type]
    image = roles.images[0].get_array()
    assert image is not None and image.shape == (3, 5, 3)
    colors = [[tuple(color) for color in row] for row in image.tolist()]
    assert [len(set(row)) for row in colors] == [2, 1, 3]  # normal then imbalanced; decode, prefill, then gone
    legend = roles.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["prefill", "decode", "normal", "imbalanced"]


def test_of_many_instances_only_the_sum_is_drawn() -> None:
    one = result().samples[0].instances["prefill-0"]
    many = {f"prefill-{i}": one for i in range(100)}
    run = result()
    run.samples = [Sample(float(i), many, Regime.NORMAL) for i in range(5000)]
    queue, *_, roles = plots.load_figure(run).axes
    assert [next(iter(line.get_ydata())) for line in queue.lines] == [90_000]  # type: ignore[arg-type]
    image = roles.images[0].get_array()
    assert image is not None and image.shape[0] == 101 and image.shape[1] < 5000


def test_latencies_climb_to_one_and_the_slo_stands_upright() -> None:
    ttft, tpot, itl = plots.latency_figure(result(), SLO).axes
    assert list(ttft.lines[0].get_xdata()) == [500.0, 1000.0, 1000.0]  # type: ignore[arg-type]
    assert [len(axes.lines) for axes in (ttft, tpot, itl)] == [2, 2, 1]
    assert list(tpot.lines[1].get_xdata()) == [1000.0, 1000.0]  # type: ignore[arg-type]
    assert all(list(axes.lines[0].get_ydata())[-1] == 1.0 for axes in (ttft, tpot, itl))  # type: ignore[arg-type]


def test_a_run_without_answers_can_be_drawn(tmp_path: Path) -> None:
    assert plots.write_plots(tmp_path, SimResult([], Distribution(), 0.0), SLO)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"flowkv\[plots\]"):
        plots.write_plots(tmp_path / "out", result(), SLO)
    assert not (tmp_path / "out").exists()


# --- the Chrome trace ----------------------------------------------------------------------------------------------

Event = dict[str, Any]


def traced(tmp_path: Path, run: SimResult, recorder: Recorder) -> list[Event]:
    path = tmp_path / "trace.json"
    write_chrome_trace(path, run, recorder)
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])["traceEvents"]  # type: ignore[no-any-return]


def recorded() -> Recorder:
    recorder = Recorder()
    recorder.origin_s = 0.5
    recorder.chunk(0, "prefill-0", 1.75, 2.0, 512)
    recorder.chunk(0, "prefill-0", 2.0, 2.5, 488)
    recorder.reserved(0, "decode-0", immediate=7)
    recorder.write("prefill-0", "decode-0", 7, 2.0, 2.25, 64)
    recorder.reserved(1, "decode-0", immediate=8)
    recorder.write("prefill-0", "decode-0", 7, 2.5, 2.75, 62)
    return recorder


def slices(events: list[Event], request: int) -> dict[str, list[tuple[str, float, float]]]:
    """By instance: (name, start s, end s) of what lies within the slice of this request."""
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    whole = [event for event in events if event["ph"] == "X"]
    found = defaultdict(list)
    for outer in whole:
        if outer["name"] == f"request {request}":
            for event in whole:
                start, stop = event["ts"], event["ts"] + event["dur"]
                is_row = (event["pid"], event["tid"]) == (outer["pid"], outer["tid"])
                if is_row and outer["ts"] <= start and stop <= outer["ts"] + outer["dur"]:
                    found[names[outer["pid"]]].append((event["name"], start / 1e6, stop / 1e6))
    return found


def test_a_life_on_two_instances(tmp_path: Path) -> None:
    life = slices(traced(tmp_path, result(), recorded()), 0)
    assert life["prefill-0"] == [
        ("request 0", 1.0, 2.0), ("queue", 1.0, 1.25), ("chunk", 1.25, 1.5), ("chunk", 1.5, 2.0),
    ]  # fmt: skip
    assert life["decode-0"] == [
        ("request 0", 1.5, 4.0), ("transfer", 1.5, 1.75), ("transfer", 2.0, 2.25), ("decode", 2.25, 4.0),
    ]  # fmt: skip


def test_a_life_on_one_instance_and_one_of_which_no_more_is_known(tmp_path: Path) -> None:
    events = traced(tmp_path, result(), Recorder())
    assert slices(events, 2) == {
        "decode-0": [("request 2", 2.0, 3.5), ("queue and prefill", 2.0, 2.5), ("decode", 2.5, 3.5)]
    }
    assert set(slices(events, 1)) == {"prefill-0", "decode-0"}
    assert not slices(events, 3)  # refused


def test_an_arrow_leads_from_prefill_to_decode(tmp_path: Path) -> None:
    events = traced(tmp_path, result(), recorded())
    arrows = {(event["ph"], event["id"]): event["ts"] / 1e6 for event in events if event["ph"] in "sf"}
    assert arrows == {("s", 0): 2.0, ("f", 0): 2.25, ("s", 1): 2.5, ("f", 1): 2.5}


def test_flips_are_marked_on_their_instance(tmp_path: Path) -> None:
    (flip,) = (event for event in traced(tmp_path, result(), Recorder()) if event["ph"] == "i")
    assert (flip["name"], flip["ts"]) == ("decode -> prefill (imbalanced)", 3e6)


def test_what_lies_in_one_row_does_not_overlap(tmp_path: Path) -> None:
    run = result()
    run.records = [handed_over(i, 0.3 * i) if i % 2 else stayed(i, 0.3 * i) for i in range(40)]
    rows = defaultdict(list)
    for event in traced(tmp_path, run, Recorder()):
        if event["ph"] == "X" and event["name"].startswith("request"):
            rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, rows.values())) == 60
    for spans in rows.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(spans)))
    assert 3 < len(rows) < 15  # rows are used again


def test_a_trace_of_nothing_is_a_trace(tmp_path: Path) -> None:
    assert traced(tmp_path, SimResult([], Distribution(), 0.0), Recorder()) == []
