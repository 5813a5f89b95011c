"""Real servers for tests: `flowkv serve` as a user starts it, in a process group of its own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_TIMEOUT_S = 120.0
_SERVING = re.compile(r"serving at (http://\S+)")


class Server:
    """A running `flowkv serve`; what it prints is in `lines`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "flowkv.cli", "serve", "--port", "0", *arguments]
        self._tmp = tempfile.TemporaryDirectory()
        environment = os.environ | {"TMPDIR": self._tmp.name}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
        )  # fmt: skip
        self.lines: list[str] = []
        self.url = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_for_line(_SERVING)
        self.client = httpx.Client(base_url=self.url, timeout=60.0)

    def wait_for_line(self, pattern: "re.Pattern[str]", after: int = 0) -> None:
        """Until a line from number `after` on matches."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._matches(pattern, after), START_TIMEOUT_S)
        assert found, f"no line like {pattern.pattern!r} in:\n" + "".join(self.lines)

    def processes(self) -> list[int]:
        """Ids of every living process of this server's session, the launcher included."""
        entries = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [int(entry.name) for entry in entries if _session_and_state(entry) == (self.process.pid, True)]

    def pid_of(self, name: str) -> int:
        """The process of an instance, found by the mailbox it has bound."""
        for pid in self.processes():
            if pid != self.process.pid and _owns_socket(pid, f"/{name}"):
                return pid
        raise AssertionError(f"no process of {name}")

    def gauge(self, name: str) -> dict[str, float]:
        """A metric's value by instance."""
        pattern = re.compile(rf'^{name}{{.*?instance="([^"]+)".*?}} (\S+)$', re.M)
        return {match[1]: float(match[2]) for match in pattern.finditer(self.client.get("/metrics").text)}

    def files(self) -> list[str]:
        """What it has in the temporary directory, which it has for itself."""
        return [entry.name for entry in Path(self._tmp.name).iterdir()]

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Signal the launcher and wait; the exit code."""
        self.process.send_signal(signum)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(60.0)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def close(self) -> None:
        self.client.close()
        self._tmp.cleanup()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                if (match := _SERVING.search(line)) is not None:
                    self.url = match[1]
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _matches(self, pattern: "re.Pattern[str]", after: int) -> bool:
        return any(pattern.search(line) for line in self.lines[after:]) or self.process.poll() is not None


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
        server.wait()
        assert server.files() == [], "the server has left files behind"
        assert server.processes() == [], "the server has left processes behind"
        server.close()


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait for something that other processes bring about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.02)


def _session_and_state(entry: Path) -> tuple[int, bool]:
    """(session id, whether it lives) of a process; a zombie does not live."""
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return (0, False)
    return int(fields[3]), fields[0] not in "ZX"


def _owns_socket(pid: int, path_end: str) -> bool:
    inodes = {
        line.split()[6]
        for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
        if line.endswith(path_end)
    }
    links = (str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink())
    return any(link.removeprefix("socket:[").removesuffix("]") in inodes for link in links)
