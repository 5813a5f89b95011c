"""Real servers for tests: `flowkv serve` and `flowkv join` as a user starts them, in process groups of their own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import httpx

from benchmarks.chaos.running import living, read_stat
from flowkv.messages import Message
from flowkv.wire import Outbox, SyncContext

START_TIMEOUT_S = 120.0
_LAST_LINES_S = 10.0  # to read what was printed last
_SERVING = re.compile(r"serving at (http://\S+)")


class Launched:
    """A running launcher that has shown a line like `ready`; what it prints is in `lines`.

    It has a temporary directory for itself. `prefix` goes before its command, `environment` over this process's own.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        ready: "re.Pattern[str]",
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._tmp = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "flowkv.cli", *arguments],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"TMPDIR": self._tmp.name} | dict(environment or {}),
        )  # fmt: skip
        self.lines: list[str] = []
        self._has_ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait_for_line(ready)
        except BaseException:
            self.close()
            raise

    def wait_for_line(self, pattern: "re.Pattern[str]", after: int = 0) -> None:
        """Until a line from number `after` on matches."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._matches(pattern, after), START_TIMEOUT_S)
        assert found, f"no line like {pattern.pattern!r} in:\n" + "".join(self.lines)

    @property
    def pid(self) -> int:
        """Of the launcher, which leads a session of its own."""
        return self.process.pid

    def processes(self) -> list[int]:
        """Ids of every living process of this launcher's session, itself included."""
        return [process.pid for process in living(self)]

    def pid_of(self, name: str) -> int:
        """The process of an instance, by what `ps` calls it."""
        found = [process.pid for process in living(self) if process.pid != self.pid and process.name == name[:15]]
        assert found, f"no process of {name}"
        return found[0]

    def run_folder(self) -> Path:
        """Where its processes meet."""
        [folder] = [entry for entry in Path(self._tmp.name).iterdir() if entry.name.startswith("flowkv-")]
        return folder

    def files(self) -> list[str]:
        """What it has in the temporary directory, which it has for itself."""
        return [entry.name for entry in Path(self._tmp.name).iterdir()]

    def tell_launcher(self, message: Message) -> None:
        """As another process of its node would."""
        context = SyncContext()
        outbox = Outbox(context)
        outbox.send(f"ipc://{self.run_folder()}/launcher", message)
        outbox.close()
        context.term()

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Signal the launcher and wait; the exit code."""
        self.process.send_signal(signum)
        return self.wait()

    def wait(self) -> int:
        """Until it has ended; the exit code. What it has left behind may go on printing."""
        code = self.process.wait(60.0)
        self._reader.join(_LAST_LINES_S)
        return code

    def close(self) -> None:
        """Whatever is left of it: a test that fails leaves nothing to those after it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._tmp.cleanup()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _matches(self, pattern: "re.Pattern[str]", after: int) -> bool:
        return any(pattern.search(line) for line in self.lines[after:]) or self._has_ended


class Server(Launched):
    """A running `flowkv serve`."""

    def __init__(
        self, *arguments: str, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(("serve", "--port", "0", *arguments), _SERVING, prefix, environment)
        found = [match[1] for line in self.lines if (match := _SERVING.search(line)) is not None]
        if not found:
            super().close()
            raise AssertionError("it does not serve:\n" + "".join(self.lines))
        self.url = found[0]
        self.client = self._new_client()

    def connect_anew(self, max_connections: int = 100) -> None:
        """With a client that has no connection yet."""
        self.client.close()
        self.client = self._new_client(max_connections)

    def gauge(self, name: str) -> dict[str, float]:
        """A metric's value by instance."""
        pattern = re.compile(rf'^{name}{{.*?instance="([^"]+)".*?}} (\S+)$', re.M)
        return {match[1]: float(match[2]) for match in pattern.finditer(self.client.get("/metrics").text)}

    def close(self) -> None:
        self.client.close()
        super().close()

    def _new_client(self, max_connections: int = 100) -> httpx.Client:
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=20)
        return httpx.Client(base_url=self.url, timeout=60.0, limits=limits)


LaunchedT = TypeVar("LaunchedT", bound=Launched)


@contextmanager
def serving(
    *arguments: str, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    with cleared_up(Server(*arguments, prefix=prefix, environment=environment)) as server:
        yield server


@contextmanager
def cleared_up(launched: LaunchedT) -> Iterator[LaunchedT]:
    """Stop it at the end, and see that it leaves nothing behind."""
    with closing(launched):
        try:
            yield launched
        except BaseException:
            print("".join(launched.lines))  # pytest shows it with the failure
            raise
        finally:
            if launched.process.poll() is None:
                launched.stop()
            launched.wait()
            assert launched.files() == [], "it has left files behind"
            assert launched.processes() == [], "it has left processes behind"


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait for something that other processes bring about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.02)


def pause(pid: int) -> None:
    """Stop a process until SIGCONT. A signal that was sent is only on its way: on return every thread has stopped."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    eventually(lambda: all(is_stopped(task) for task in tasks.iterdir()), f"{pid} is stopped")


def is_stopped(entry: Path) -> bool:
    thread = read_stat(entry)
    return thread is not None and thread.state == "T"
