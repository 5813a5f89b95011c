import multiprocessing
import os
import time
from collections.abc import Callable

import pytest

from flowkv.child import child_main
from flowkv.signals import END_SIGNAL, STOP_SIGNALS


class Finalized:
    """Something that is told to stop while it is being cleared away."""

    def __del__(self) -> None:
        os.kill(os.getpid(), END_SIGNAL)
        time.sleep(0.01)  # lets the handler run here, where an exception goes nowhere


def in_a_finalizer() -> None:
    Finalized()
    time.sleep(60.0)


def told_by_others() -> None:
    for signum in STOP_SIGNALS:
        os.kill(os.getpid(), signum)
    print("goes on", flush=True)


def at_work() -> None:
    os.kill(os.getpid(), END_SIGNAL)
    time.sleep(60.0)


def while_clearing_up() -> None:
    try:
        at_work()
    finally:
        os.kill(os.getpid(), END_SIGNAL)  # again
        time.sleep(0.01)
        print("cleared up", flush=True)


@pytest.mark.parametrize(
    ("target", "says"),
    [(in_a_finalizer, ""), (at_work, ""), (while_clearing_up, "cleared up\n"), (told_by_others, "goes on\n")],
)
def test_a_child_that_is_told_to_stop_ends_quietly(
    target: Callable[[], None], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=child_main, args=("child", [], target, ()))
    process.start()
    process.join(30.0)
    if process.is_alive():
        process.kill()
        process.join()
    assert (process.exitcode, *capfd.readouterr()) == (0, says, "")
