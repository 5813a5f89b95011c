"""How a launcher is told to stop."""

import contextlib
import os
import signal

from flowkv.child import STOP_SIGNALS


class StopRequested(Exception):
    """One of STOP_SIGNALS has come, and everything is to end at once."""


class StopSignals:
    """Once `lets_drain` is set the first signal only asks for a drain, and `fd` can be read; any other raises
    `StopRequested`, once: a second time would interrupt the clearing up that it began."""

    def __init__(self) -> None:
        self.lets_drain = False
        self.is_drain_asked = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_over = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def ask_drain(self) -> None:
        self.is_drain_asked = True
        os.eventfd_write(self.fd, 1)

    def heed(self) -> None:
        """`fd` has been seen."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def ignore(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        os.close(self.fd)

    def _handle(self, signum: int, frame: object) -> None:
        if self.lets_drain and not self.is_drain_asked:
            self.ask_drain()
        elif not self._is_over:
            self._is_over = True
            raise StopRequested
