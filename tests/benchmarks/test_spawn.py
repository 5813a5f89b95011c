"""ServerProcess against a stand-in for the `flowkv` program."""

import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks import BenchmarkError
from benchmarks.spawn import ServerProcess

STAND_IN = """#!{python}
import http.server, signal, subprocess, sys
arguments = sys.argv[2:]
print("arguments", *arguments, flush=True)
if "--broken" in arguments:
    sys.exit(3)
if "--child" in arguments:
    child = subprocess.Popen(["sleep", "600"])
    print("child", child.pid, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7 if "--ends-badly" in arguments else 0))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "--never-ready" in arguments else 200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(arguments[-1])), Handler).serve_forever()
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log file of a server; `flowkv` beside the interpreter is the stand-in."""
    program = tmp_path / "flowkv"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return tmp_path / "logs" / "server.log"


def test_a_server_lives_as_long_as_the_block(log: Path) -> None:
    with ServerProcess(["--mixed", "1"], log) as url:
        assert httpx.get(url).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    port = url.rpartition(":")[2]
    assert log.read_text().splitlines()[0] == f"arguments --mixed 1 --host 127.0.0.1 --port {port}"


def test_a_server_that_does_not_start_shows_its_last_lines(log: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"did not start \(exit code 3\)\n  \| arguments --broken"):
        ServerProcess(["--broken"], log).__enter__()


def test_a_server_that_is_never_ready_is_stopped(log: Path) -> None:
    server = ServerProcess(["--never-ready"], log, start_timeout_s=1.5)
    with pytest.raises(BenchmarkError, match=r"not ready after 1\.5 s"):
        server.__enter__()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_an_exit_code_other_than_zero_is_an_error(log: Path) -> None:
    with pytest.raises(BenchmarkError, match="ended with code 7 on SIGTERM"), ServerProcess(["--ends-badly"], log):
        pass


def test_a_process_left_behind_is_an_error_and_killed(log: Path) -> None:
    server = ServerProcess(["--child"], log, linger_s=0.3)
    with pytest.raises(BenchmarkError, match="left processes behind"), server:
        pass
    pid = int(re.findall(r"^child (\d+)$", log.read_text(), re.MULTILINE)[0])
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def test_what_went_wrong_first_is_what_is_raised(log: Path) -> None:
    with pytest.raises(KeyError, match="first"), ServerProcess(["--ends-badly"], log):
        raise KeyError("first")


def test_a_program_that_is_not_installed(log: Path) -> None:
    (log.parent.parent / "flowkv").unlink()
    with pytest.raises(BenchmarkError, match="run `make venv`"):
        ServerProcess([], log)
