"""`flowkv doctor` as a user calls it."""

import json
import socket

import pytest

from flowkv.cli import main
from flowkv.doctor.finding import Finding, Level
from flowkv.doctor.report import show


def test_a_toy_on_a_free_port_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--toy", "--port", "0", "--kv-memory", "1MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("0 fail")
    checks = "versions|kernel|run folder|HTTP|model|cores|instructions|memory|shared memory|locked memory|huge pages"
    for check in (*checks.split("|"), "open files", "processes", "GPU", "NIXL", "extras", "clock"):
        assert any(line[6:].startswith(check) for line in lines), check


def test_what_fails_is_named_and_is_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        assert main(["doctor", "--toy", "--port", port, "--set", "engine.kv_memory=900TiB", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    failed = {finding["check"] for finding in document["findings"] if finding["level"] == "fail"}
    assert failed == {"HTTP", "memory"}


def test_options_are_those_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--toy", "--set", "engine.blok_size=1"]) == 1
    assert "blok_size" in capsys.readouterr().err


def test_advice_stands_below(capsys: pytest.CaptureFixture[str]) -> None:
    assert show([Finding("ports", Level.WARN, "all taken", "take others"), Finding("clock", Level.OK, "ticks")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["warn", "ports", "all", "taken"]
    assert lines[1].strip() == "-> take others"
    assert lines[-1] == "1 ok, 1 warn, 0 fail"
