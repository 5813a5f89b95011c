"""The command as a user runs it, with one kill of a toy and one of the controller."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import ROOT


def test_one_command_kills_and_measures(tmp_path: Path) -> None:
    output = tmp_path / "chaos.json"
    options = "--only calm killed --calm-seconds 0.5 --seconds 0.5 --every 0.5 --clients 8"
    command = [sys.executable, "-m", "benchmarks.chaos", *options.split(), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    calm, killed = json.loads(output.read_text())["phases"]
    assert (calm["num_kills"], calm["num_hit"], calm["num_recovered_tokens"]) == (0, 0, 0)
    assert (killed["num_kills"], killed["num_controller_kills"]) == (1, 1)
    assert killed["replaced_s"] is not None and killed["controller_replaced_s"] is not None
    for phase in (calm, killed):
        assert phase["num_equal"] == phase["num_requests"] > 0 and phase["problems"] == []
        assert phase["output_tokens_per_s"] > 0
        assert not any(phase["left"].values())
