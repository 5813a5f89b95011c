"""Start `flowkv serve` for one measurement, and see that nothing of it is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn

import httpx
import psutil

from benchmarks import BenchmarkError

LOG_TAIL_LINES = 15
STOP_TIMEOUT_S = 60.0


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that `with ServerProcess(...)` stops its server then too."""

    def leave(signum: int, frame: object) -> NoReturn:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, leave)


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """A `flowkv serve` on a free loopback port, from `with` to the end of the block; the context's value is its URL.

    Its output goes to `log`, or (None) to this terminal, progress bar included; `environment` goes over this process's
    own. Leaving the block sends SIGTERM and raises BenchmarkError where the server then ends with a code other than 0,
    or leaves a process that is still there `linger_s` later.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path | None,
        start_timeout_s: float = 300.0,
        linger_s: float = 10.0,
        environment: Mapping[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        port = free_port()
        program = Path(sys.executable).with_name("flowkv")
        if not program.exists():
            raise BenchmarkError(f"{program} is missing: run `make venv`")
        self.url = f"http://127.0.0.1:{port}"
        self._command = [str(program), "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._linger_s = linger_s
        self._environment = os.environ | dict(environment or {})
        self._start_new_session = start_new_session

    def __enter__(self) -> str:
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("w") as output:
                self._process = self._start(output)
        else:
            self._process = self._start(None)
        try:
            self._wait_ready()
        except BaseException:
            self._terminate()
            raise
        return self.url

    @property
    def pid(self) -> int:
        """Of the launcher, once it has been started."""
        return self._process.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = self._terminate()
        if kind is not None:
            return  # what went wrong first is what the user must see
        if self._process.returncode != 0:
            raise BenchmarkError(f"the server ended with code {self._process.returncode} on SIGTERM{self._log_tail()}")
        if left:
            raise BenchmarkError(f"the server left processes behind: {', '.join(map(str, left))}")

    def _start(self, output: IO[str] | None) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=self._environment, start_new_session=self._start_new_session,
        )  # fmt: skip

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + self._start_timeout_s
        while self._process.poll() is None:
            if self._is_ready():
                return
            if time.monotonic() > deadline_s:
                raise BenchmarkError(f"the server was not ready after {self._start_timeout_s:g} s{self._log_tail()}")
            time.sleep(0.1)
        raise BenchmarkError(f"the server did not start (exit code {self._process.returncode}){self._log_tail()}")

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False  # the frontend does not listen yet

    def _terminate(self) -> list[int]:
        """Stop the server; the ids of processes of its own that outlived it (they are killed)."""
        if self._process.poll() is not None:
            return []
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        deadline_s = time.monotonic() + self._linger_s
        while (left := list(filter(_is_alive, family))) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        for process in left:
            process.kill()
        return [process.pid for process in left]

    def _log_tail(self) -> str:
        if self._log is None:
            return ""
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "".join(f"\n  | {line}" for line in lines) + f"\n(all of it: {self._log})"


def _is_alive(process: psutil.Process) -> bool:
    """False for a zombie too: whoever adopted it has not looked yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
