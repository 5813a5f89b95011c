"""aiperf and lm-eval, unmodified, against a real server. They bring two gigabytes: in `make test-all` only."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.clients import NUM_PROFILED, questions, run, write_tasks
from benchmarks.report import ROOT
from flowkv.bundled.recall import VALUES
from tests.heavy.leftovers import leaving_nothing


@pytest.mark.slow
def test_aiperf_and_lm_eval_find_what_there_is_to_find() -> None:
    with leaving_nothing("--prefill", "1", "--decode", "1", "--threads", "1") as server:
        found = run(server.url, ROOT / "results" / "clients", Console(stderr=True))
    assert (found["aiperf"]["request_count"], found["aiperf"]["request_error_rate"]) == (NUM_PROFILED, 0.0)
    assert found["aiperf"]["good_request_count"] == NUM_PROFILED
    assert min(found["lm_eval"]["exact_match"], found["lm_eval"]["accuracy"]) >= 0.9


def test_questions_have_one_right_answer(tmp_path: Path) -> None:
    for question in questions(5, seed=1):
        name, _, value = question["answer"].partition(" = ")
        assert f"{name} = {value}\n" in question["prompt"] and value in VALUES
        assert question["choices"][question["label"]] == question["answer"]
        assert len(set(question["choices"])) == 4
    write_tasks(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "flowkv_recall_choice.yaml", "flowkv_recall_generate.yaml", "recall.jsonl"
    ]  # fmt: skip
