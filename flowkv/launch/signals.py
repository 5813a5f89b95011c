"""How a launcher is told to stop."""

import contextlib
import math
import os
import signal
import time

from flowkv.signals import STOP_SIGNALS

_SAME_S = 0.25  # `timeout` and others tell the launcher, and then its whole group once more


class StopRequested(Exception):
    """One of STOP_SIGNALS has come, and everything is to end at once."""


class StopSignals:
    """Once `lets_drain` is set the first signal asks for a drain only; one that comes a while later, or before that,
    for an end. `fd` can be read then, and `heed` says so: an exception out of nowhere would break off what must not be
    left half done, such as the start of a process. (To block signals meanwhile is not enough: libraries have threads.)
    """

    def __init__(self) -> None:
        self.lets_drain = False
        self.is_drain_asked = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_end_asked = False
        self._asked_s = -math.inf  # by a signal; an operator's drain may be cut short at once
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` wants it
                signal.signal(number, self._handle)

    def ask_drain(self) -> None:
        self.is_drain_asked = True
        os.eventfd_write(self.fd, 1)

    def heed(self) -> None:
        """Raises `StopRequested` if everything is to end; `fd` has been seen."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        if self._is_end_asked:
            raise StopRequested

    def ignore(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        os.close(self.fd)

    def _handle(self, signum: int, frame: object) -> None:
        if self.lets_drain and not self.is_drain_asked:
            self._asked_s = time.monotonic()
            self.ask_drain()
        elif time.monotonic() > self._asked_s + _SAME_S:
            self._is_end_asked = True
            os.eventfd_write(self.fd, 1)
