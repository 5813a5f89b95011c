"""What a user gets for a mistake: one clear line and a non-zero exit, no traceback."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def flowkv(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flowkv.cli", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "FLOWKV_CLUSTER_KEY"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder"], "there is no model folder /no/such/folder"),
        (["."], "no config.json"),
        (["--toy", "--set", "engine.blok_size=1"], "blok_size"),
        (["--toy", "--config", "/no/such/file.toml"], "no configuration file"),
        (["--toy", "--prefill", "0", "--decode", "0"], "at least one instance"),
        (["--toy", "--kv-memory", "1"], "less than one block"),
        (["--toy", "--slo-ttft", "-1"], "slo.ttft_s is a positive number of seconds"),
        (["--toy", "--admission"], "slo.admission needs slo.ttft_s"),
        (["--toy", "--min-instances", "3", "--max-instances", "2"], "min_instances is at most"),
        (["--toy", "--kv-memory", "900TiB"], "does not fit into"),
        (["--toy", "--host", "no.such.host.invalid", "--insecure"], "no.such.host.invalid"),
        (["--toy", "--host", "0.0.0.0"], "whoever reaches 0.0.0.0 could use this server: make keys"),
        (["--toy", "--api-key-file", "/no/such/file"], "the key file /no/such/file cannot be read"),
        (["--toy", "--tls-cert-file", "/no/such/file"], "go together"),
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


def test_a_key_for_a_client(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = flowkv("api-key", "alice", "--file", str(path)).stdout.strip()
    line = path.read_text().strip()
    assert key.startswith("fk-") and line.startswith("alice:") and key not in line
    assert "already" in flowkv("api-key", "alice", "--file", str(path)).stderr
    shown, shown_line = flowkv("api-key", "bob").stdout.splitlines()
    assert shown.startswith("fk-") and shown_line.startswith("bob:")


def test_another_node_needs_an_address_and_a_key(tmp_path: Path) -> None:
    listen = ("serve", "--toy", "--port", "0", "--listen")
    joining = ("join", "127.0.0.1:9", "--role", "decode")
    short = ("--cluster-key-file", key_file(tmp_path, "short"))
    key = ("--cluster-key-file", key_file(tmp_path, flowkv("key").stdout))
    with socket.create_server(("127.0.0.1", 0)) as other:
        busy = f"127.0.0.1:{other.getsockname()[1]}"
        mistakes: list[tuple[Sequence[str], str]] = [
            ((*listen, "127.0.0.1"), "--listen needs a key that all nodes share"),
            ((*listen, "127.0.0.1", *short), "has 5 characters, fewer than 32"),
            ((*listen, "192.0.2.1", *key), "192.0.2.1, which must be an address of this node"),
            ((*listen, "0.0.0.0", *key), "give the address by which they reach this one"),
            ((*listen, busy, *key), "Address already in use"),
            (joining, "joining takes the cluster's key"),
            ((*joining, "--address", "192.0.2.1", *key), "192.0.2.1, which must be an address of this node"),
            ((*joining, "--timeout", "0.5", *key), "within 0.5 s: no controller listens there"),
        ]
        for arguments, words in mistakes:
            result = flowkv(*arguments)
            assert result.returncode == 1 and "Traceback" not in result.stderr
            last = result.stderr.strip().splitlines()[-1]
            assert last.startswith("flowkv: error: ") and words in last, last


def key_file(folder: Path, text: str) -> str:
    path = folder / f"key-{len(text)}"
    path.touch(0o600)
    path.write_text(text)
    return str(path)


def test_keys_are_new_and_long_enough() -> None:
    one, other = flowkv("key").stdout.strip(), flowkv("key").stdout.strip()
    assert one != other and len(one) >= 32


def test_top_without_a_server_gets_one_line() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        result = flowkv("top", url)
    assert result.returncode == 1
    assert result.stderr.startswith(f"flowkv: error: nothing answers at {url}: ") and result.stderr.count("\n") == 1
    for interval in ("0", "soon", "nan"):
        assert f"'{interval}' is no positive number of seconds" in flowkv("top", "--interval", interval).stderr


def test_help_names_every_option() -> None:
    text = flowkv("serve", "--help").stdout
    for option in ("MODEL", "--prefill", "--decode", "--mixed", "--dtype", "--port", "--listen", "--config", "--set"):
        assert option in text
    for option in ("--slo-ttft", "--slo-tpot", "--admission", "--roles", "--min-instances", "--max-instances"):
        assert option in text
    text = flowkv("join", "--help").stdout
    for option in ("CONTROLLER_ADDRESS", "MODEL", "--role", "--count", "--address", "--cluster-key-file", "--threads"):
        assert option in text
    assert flowkv("--version").stdout.startswith("flowkv ")
