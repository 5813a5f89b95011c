"""The load generator as a user runs it, on real processes with the toy model."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import ROOT


def test_one_command_starts_measures_and_stops_a_server(tmp_path: Path) -> None:
    output = tmp_path / "serve.json"
    options = "--num-requests 12 --input-length 30:300 --output-length 5 --vocab 32:126 --rate inf --warmup 1"
    command = [
        sys.executable,
        "-m",
        "benchmarks.serve",
        "--serve",
        "--toy --prefill 1 --decode 1 --roles fixed",
        *options.split(),
    ]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 requests in" in done.stdout
    (result,) = json.loads(output.read_text())["configurations"]
    assert (result["num_errors"], result["output_tokens"]) == (0, 60)
    assert result["server"]["transfers"] == 12
    assert result["server"]["transfer_bytes"] > 0
    assert result["prompt_tokens"] == result["server"]["prefill_tokens"]
