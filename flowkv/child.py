"""What every process of a cluster does first, whatever it is."""

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from flowkv.config import LoggingConfig
from flowkv.logs import set_up_logging
from flowkv.signals import END_SIGNAL, STOP_SIGNALS

_SAFE_PATH = "PYTHONSAFEPATH"
_AFTER_FINALIZER_S = 0.001
_LAST_S = 10.0  # to end in order, after the launcher's end


@contextmanager
def without_cwd() -> Iterator[None]:
    """What is started inside takes no code from the current directory, which may be a model's: a `python -c` or `-m`,
    such as those of multiprocessing, would look there first. `PYTHONPATH` counts as ever."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


def child_main(
    name: str,
    orphaned_folders: list[str],
    target: Callable[..., object],
    args: tuple[Any, ...],
    logging: LoggingConfig | None = None,
) -> None:
    """Run `target` as a process that `ps` and `top` call `name`, and end with the launcher if not before.

    A result other than 0 or None says that `target` could not start and has sent `StartFailed`. The process then waits
    to be stopped, or its end could be seen before its reason is read.

    What asks for a stop reaches the whole process group; only the launcher heeds it, and sends END_SIGNAL.
    `orphaned_folders` are removed at the end if the launcher is dead by then; who has none ends at once.
    """
    _exit_when_told()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The launcher had blocked them for this moment.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, END_SIGNAL})
    Path("/proc/self/comm").write_text(name)  # the kernel keeps 15 characters of it
    _die_with_launcher(is_at_once=not orphaned_folders)
    set_up_logging(logging or LoggingConfig(), name)
    gc.freeze()  # what is loaded stays: no collection need look at it again, which takes milliseconds each time
    try:
        status = target(*args)
    finally:
        if not _launcher().is_alive():
            for folder in orphaned_folders:
                shutil.rmtree(folder, ignore_errors=True)
    if status:
        signal.pause()


def _exit_when_told() -> None:
    """SystemExit, once; and once more for each that was raised in a finalizer, where nobody would hear of it."""
    exits = [1]

    def handle(signum: int, frame: object) -> None:
        if exits:
            exits.clear()
            sys.exit()

    def unraisable(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, SystemExit):
            sys.__unraisablehook__(what)
            return
        exits.append(1)
        signal.setitimer(signal.ITIMER_REAL, _AFTER_FINALIZER_S)

    signal.signal(END_SIGNAL, handle)
    signal.signal(signal.SIGALRM, handle)
    sys.unraisablehook = unraisable


def _launcher() -> BaseProcess:
    parent = multiprocessing.parent_process()
    assert parent is not None
    return parent


def _die_with_launcher(is_at_once: bool) -> None:
    """End this process when the launcher is gone. (A parent-death signal would watch the fork server instead, which
    lives as long as any child of its does.)"""

    def watch() -> None:
        _launcher().join()
        if not is_at_once:
            os.kill(os.getpid(), END_SIGNAL)
            time.sleep(_LAST_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="flowkv-launcher-watch", daemon=True).start()
