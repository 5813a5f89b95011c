"""The benchmark of what stands before the engines; other routers are not installed for a test."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import BenchmarkError
from benchmarks.frontend import DIRECT, OURS, Case, Figures, Gateways, ask, bodies, measure, summarize
from benchmarks.gateways.routers import ROUTERS
from flowkv.bundled import MODEL_FOLDER
from flowkv.server.text.tokenizer import ModelTokenizer

SHORT = argparse.Namespace(prompt_tokens=50, connections=[2], warmup=0.1, seconds=0.3)


@pytest.mark.parametrize(
    ("name", "cases", "processes"),
    [
        (DIRECT, [Case("text", 3, True), Case("ids", 1, False)], {"engine 0", "client"}),
        (OURS, [Case("text", 3, True), Case("ids", 1, False)], {"controller", "frontend", "instances", "client"}),
    ],
)
def test_every_request_is_answered_and_costs_something(
    name: str, cases: list[Case], processes: set[str], tmp_path: Path
) -> None:
    with Gateways([name], tmp_path).open(name, 3) as (url, pids):
        for case in cases:
            [figures] = measure(name, url, pids, case, SHORT)
            assert figures.requests_per_s > 0 and 0 < figures.first_p50_ms <= figures.p50_ms <= figures.p99_ms
            assert set(figures.cpu_us) == processes and figures.cpu_us["client"] > 0


def test_an_answer_that_is_an_error_ends_the_run(tmp_path: Path) -> None:
    with (
        Gateways([OURS], tmp_path).open(OURS, 1) as (url, _),
        pytest.raises(BenchmarkError, match=r"HTTP/1\.1 404"),
    ):
        ask(url, bodies(Case("ids", 1, False), "another", 10), 1, 0.0, 0.1)


def test_prompts_have_the_tokens_that_were_asked_for() -> None:
    tokenizer = ModelTokenizer(MODEL_FOLDER)
    texts = [json.loads(body) for body in bodies(Case("text", 16, True), "m", 120)]
    ids = [json.loads(body)["prompt"] for body in bodies(Case("ids", 16, True), "m", 120)]
    assert all(len(prompt) == 120 for prompt in ids) and len({tuple(prompt) for prompt in ids}) == len(ids)
    assert all(abs(len(tokenizer.encode(text["prompt"])) - 120) <= 2 for text in texts)
    assert texts[0]["stream"] and texts[0]["max_tokens"] == 16


def test_what_a_gateway_adds_is_beyond_the_engine_alone() -> None:
    def figures(gateway: str, p50_ms: float) -> Figures:
        return Figures(gateway, "c", 1, 100.0, p50_ms, 9.0, 1.0, {"client": 5.0})

    found = [figures(DIRECT, 1.0), figures(DIRECT, 3.0), figures(OURS, 5.0), figures(OURS, 4.0)]
    rows = {row["gateway"]: row for row in summarize(found)}
    assert rows[OURS]["added_p50_ms"] == 4.5 - 2.0 and rows[DIRECT]["added_p50_ms"] == 0.0
    assert rows[OURS]["cpu_us"] == {"client": 5.0}
    assert summarize(found[2:])[0]["added_p50_ms"] is None


def test_routers_are_started_before_two_engines() -> None:
    for router in ROUTERS:
        command = router.command(Path("python"), 30_000, ["http://a:1", "http://b:2"])
        assert command[2].endswith("_router.launch_router") and {"http://a:1", "http://b:2"} < set(command)
