import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report import environment, percentile, summarize, write_report

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], fraction: float) -> None:
    assert percentile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)), abs=1e-6)


def test_no_values_have_no_percentile_and_no_summary() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    assert summarize([]) is None


def test_summary() -> None:
    values = [float(value) for value in range(1, 102)]
    assert summarize(values) == {"mean": 51.0, "p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 101.0}


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
