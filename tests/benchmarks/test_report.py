import argparse
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.report import environment, write_report, write_results


def test_environment_names_machine_versions_and_command() -> None:
    facts = environment()
    assert facts["cores"]
    assert facts["cpu"]
    assert isinstance(facts["memory_bytes"], int)
    assert str(facts["torch"]).startswith("2.")
    assert str(facts["command"]).startswith("python ")


def test_report_is_one_json_file_with_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    write_report(path, {"figure": 1.5})
    written = json.loads(path.read_text())
    assert written["figure"] == 1.5
    assert "commit" in written["environment"]


def test_report_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path / "x.json", {"figure": float("nan")})


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_report(path, {"figure": 1.5})
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(path, {"figure": float("inf")})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_results_come_with_the_options_that_they_were_taken_with(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = argparse.Namespace(output=out, rate=math.inf, num=3, serve=["--toy", Path("model")], seconds=0.5)
    write_results(Console(quiet=True), options, {"rows": []})
    written = json.loads(out.read_text())
    assert written["options"] == {
        "output": str(out), "rate": "inf", "num": 3, "serve": ["--toy", "model"], "seconds": 0.5
    }  # fmt: skip
    assert written["rows"] == []
