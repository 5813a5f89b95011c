import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq

from flowkv.launch import children
from flowkv.launch.children import Child, Children, NotStarted
from tests.e2e.server import pause


@pytest.fixture
def started() -> Iterator[tuple[Children, Child]]:
    """One that does nothing, and would end when it is told to."""
    some = Children(zmq.Poller())
    child = some.start("sleeper", multiprocessing.get_context("spawn"), time.sleep, 600)
    yield some, child
    child.process.kill()
    child.process.join()


def ends_of(some: Children) -> list[str]:
    """How those end that do, waiting as a launcher would."""
    while not (gone := some.take_gone()):
        time.sleep(0.01)
    return [how for _, how in gone]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_no_code_of_the_current_directory_is_run(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "multiprocessing.py").write_text("import pathlib; pathlib.Path('was_run').touch()")
    monkeypatch.chdir(tmp_path)
    some = Children(zmq.Poller())
    some.stop_all()  # with the fork server of a test before this one
    some.start("short", multiprocessing.get_context(method), time.sleep, 0)
    assert ends_of(some) == ["exited with code 0"]
    some.stop_all()
    assert not (tmp_path / "was_run").exists()
    assert "PYTHONSAFEPATH" not in os.environ


def test_who_is_told_to_stop_ends_by_itself(started: tuple[Children, Child]) -> None:
    some, child = started
    assert some.next_kill_s() is None
    some.stop(child.name)  # it may not know yet what to do with a signal
    assert some.next_kill_s() is not None
    assert ends_of(some) == ["exited with code 0"]
    assert some.next_kill_s() is None
    some.stop(child.name)  # which is known no more


def test_a_signal_without_a_name_has_a_number(started: tuple[Children, Child]) -> None:
    some, child = started
    child.send_signal(signal.SIGRTMIN + 6)
    assert ends_of(some) == [f"was killed by signal {signal.SIGRTMIN + 6}"]


def test_how_it_ended_is_not_made_up_where_the_fork_server_has_died() -> None:
    some = Children(zmq.Poller())
    some.stop_all()  # with the fork server of a test before this one
    child = some.start("sleeper", multiprocessing.get_context("forkserver"), time.sleep, 600)
    fork_server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(fork_server, signal.SIGKILL)
    os.waitid(os.P_PID, fork_server, os.WEXITED | os.WNOWAIT)
    some.kill(child.name)
    assert ends_of(some) == ["ended"]
    some.stop_all()


def test_who_cannot_be_watched_is_not_left_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def no_room(pid: int) -> int:
        pids.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_room)
    some = Children(zmq.Poller())
    with pytest.raises(NotStarted, match=r"could not be started: .*Too many open files"):
        some.start("sleeper", multiprocessing.get_context("spawn"), time.sleep, 600)
    assert some.take_gone() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "Resource temporarily unavailable"), EOFError()])
def test_what_hinders_a_start_is_said_in_one_line(error: Exception) -> None:
    def start() -> None:
        raise error

    context = SimpleNamespace(Process=lambda **_: SimpleNamespace(start=start))
    with pytest.raises(NotStarted, match=r"could not be started: (.*unavailable|the fork server is gone)$"):
        Children(zmq.Poller()).start("one", context, time.sleep, 600)


def test_who_does_not_heed_it_is_killed(started: tuple[Children, Child], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_STOP_TIMEOUT_S", 0.05)
    some, child = started
    assert child.process.pid is not None
    pause(child.process.pid)
    some.stop(child.name)
    assert ends_of(some) == ["was killed by SIGKILL"]
