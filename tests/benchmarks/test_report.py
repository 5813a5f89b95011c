import json
from pathlib import Path

import pytest

from benchmarks.report import environment, write_report


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
