"""What a user gets for a mistake: one clear line and a non-zero exit, no traceback."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


def flowkv(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flowkv.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder"], "there is no model folder /no/such/folder"),
        (["."], "no config.json"),
        (["--toy", "--set", "engine.blok_size=1"], "blok_size"),
        (["--toy", "--config", "/no/such/file.toml"], "no configuration file"),
        (["--toy", "--prefill", "0", "--decode", "0"], "at least one instance"),
        (["--toy", "--kv-memory", "1"], "less than one block"),
        (["--toy", "--kv-memory", "900TiB"], "does not fit into"),
        (["--toy", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ],
)
def test_a_mistake_gets_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = flowkv("serve", "--port", "0", *arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("flowkv: error: ") and words in last


def test_a_busy_port_gets_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = flowkv("serve", "--toy", "--port", str(port))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"port {port}" in result.stderr.strip().splitlines()[-1]


def test_help_names_every_option() -> None:
    text = flowkv("serve", "--help").stdout
    for option in ("MODEL", "--prefill", "--decode", "--mixed", "--dtype", "--port", "--config", "--set"):
        assert option in text
    assert flowkv("--version").stdout.startswith("flowkv ")
