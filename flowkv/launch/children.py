"""The processes that a launcher has started."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import zmq

from flowkv.child import child_main, without_cwd
from flowkv.config import LoggingConfig
from flowkv.errors import FlowKVError
from flowkv.signals import END_SIGNAL, STOP_SIGNALS

_STOP_TIMEOUT_S = 10.0
_EXIT_CODE_TIMEOUT_S = 1.0  # for the fork server to say how its child ended
_UNKNOWN_EXIT_CODE = 255  # what multiprocessing says where the fork server has died


class NotStarted(FlowKVError):
    """There is no process: the machine has no room for one more, or who was to fork it is gone."""


@dataclass(slots=True)
class Child:
    """`pid_fd` is what is believed: it tells of this very process, and of no other.

    (What `multiprocessing` says of a forked process comes from the fork server, and is wrong once that has died.)
    """

    name: str
    process: BaseProcess
    pid_fd: int
    is_ready: bool = False
    kill_due_s: float | None = None  # it was told to stop, and has until then

    def send_signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pid_fd, signum)

    def is_gone(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended, after waiting for that so long."""
        return bool(select.select([self.pid_fd], [], [], timeout_s)[0])

    def describe_exit(self) -> str:
        self.process.join(_EXIT_CODE_TIMEOUT_S)
        exitcode = self.process.exitcode
        if exitcode is None or exitcode == _UNKNOWN_EXIT_CODE:
            return "ended"
        return f"was killed by {_signal_name(-exitcode)}" if exitcode < 0 else f"exited with code {exitcode}"


class Children:
    """By name; `poller` wakes when one ends."""

    def __init__(self, poller: zmq.Poller) -> None:
        self._poller = poller
        self._children: dict[str, Child] = {}
        self.logging = LoggingConfig()  # of those that are started from now on

    def start(
        self, name: str, context: Any, target: Callable[..., object], *args: Any, orphaned_folders: tuple[str, ...] = ()
    ) -> Child:
        """Run `target(*args)` in a process of `context` (of multiprocessing), under `child_main`. Raises NotStarted."""
        process = context.Process(
            target=child_main, args=(name, list(orphaned_folders), target, args, self.logging), name=f"flowkv {name}"
        )  # fmt: skip
        # A signal to the whole group must not find a process that does not know yet what to do with it, nor ever the
        # fork server or the tracker.
        try:
            with without_cwd():
                signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, END_SIGNAL})
                resource_tracker.ensure_running()  # which unblocks those that it ignores
                signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, END_SIGNAL})
                process.start()
            child = self._children[name] = Child(name, process, _pid_fd(process))
            self._poller.register(child.pid_fd, zmq.POLLIN)
        except (OSError, EOFError) as error:
            raise NotStarted(f"could not be started: {str(error) or 'the fork server is gone'}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, END_SIGNAL})
        return child

    def start_caretaker(self, name: str, context: Any, orphaned_folders: tuple[str, ...]) -> None:
        """A process that does nothing, but remove these folders if the launcher is killed."""
        self.start(name, context, _take_care, orphaned_folders=orphaned_folders).is_ready = True

    def get(self, name: str) -> Child | None:
        """None if it has ended."""
        return self._children.get(name)

    @property
    def are_ready(self) -> bool:
        return all(child.is_ready for child in self._children.values())

    def stop(self, name: str, signum: int = END_SIGNAL, last_s: float = 0.0) -> None:
        """Tell it to; what has not ended `last_s` and a while later is killed by `take_gone`. Nothing is to be done if
        it has ended."""
        child = self.get(name)
        if child is not None and child.kill_due_s is None:
            child.kill_due_s = time.monotonic() + last_s + _STOP_TIMEOUT_S
            child.send_signal(signum)

    def kill(self, name: str) -> None:
        """By force, and at once."""
        if (child := self.get(name)) is not None:
            child.send_signal(signal.SIGKILL)

    def next_kill_s(self) -> float | None:
        """Seconds until `take_gone` will have one to kill."""
        due_s = [child.kill_due_s for child in self._children.values() if child.kill_due_s is not None]
        return max(0.0, min(due_s) - time.monotonic()) if due_s else None

    def take_gone(self) -> list[tuple[Child, str]]:
        """Those that have ended since the last call, each with how."""
        now_s = time.monotonic()
        for child in self._children.values():
            if child.kill_due_s is not None and now_s >= child.kill_due_s:
                child.kill_due_s = None
                child.send_signal(signal.SIGKILL)
        gone = [child for child in self._children.values() if child.is_gone()]
        return [(child, self._forget(child)) for child in gone]

    def stop_all(self, first: str | None = None) -> None:
        """`first` alone, while the rest still runs; then everyone; then by force."""
        if first is not None and (child := self.get(first)) is not None:
            child.send_signal(END_SIGNAL)
            child.is_gone(_STOP_TIMEOUT_S)
        for child in self._children.values():
            child.send_signal(END_SIGNAL)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        for child in self._children.values():
            if not child.is_gone(max(0.0, deadline_s - time.monotonic())):
                child.send_signal(signal.SIGKILL)
                child.is_gone(_STOP_TIMEOUT_S)
            os.close(child.pid_fd)
        self._children.clear()
        # Both would end by themselves a while after this process; nobody should find them still there.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]

    def _forget(self, child: Child) -> str:
        del self._children[child.name]
        self._poller.unregister(child.pid_fd)
        os.close(child.pid_fd)
        return child.describe_exit()


def _pid_fd(process: BaseProcess) -> int:
    """A process that could not be watched is ended."""
    assert process.pid is not None
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.join(_EXIT_CODE_TIMEOUT_S)
        raise


def _signal_name(number: int) -> str:
    """Those for real-time have none."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _take_care() -> None:
    while True:
        signal.pause()
