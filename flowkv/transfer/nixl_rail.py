"""A rail: one agent that writes, on a thread of its own."""

import contextlib
import logging
import math
import queue
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flowkv.transfer.base import Arrived
from flowkv.transfer.done import Done
from flowkv.transfer.nixl_agent import Blocks, Connection, Endpoint, WritingAgent

ARRIVED = struct.Struct("<QI")  # the notification that follows a write: immediate, number of blocks
POLL_INTERVAL_S = 100e-6  # while something is due
_RETRY_S = 0.5
_OVERDUE_S = 1.0  # a peer that has not answered for so long is looked at now and then

_logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Link:
    """A peer's pool. `num_rails_up` is for the thread that polls."""

    peer: str
    endpoint: Endpoint
    num_blocks: int
    num_rails_up: int = 0


@dataclass(eq=False, slots=True)
class Submission:
    """What has come of a `submit`, part by part: for the thread that polls."""

    ticket: int
    num_parts_left: int
    num_bytes: int = 0
    seconds: float = 0.0
    error: str | None = None


class Part:
    """What one rail writes of a submission. Who claims it, the rail to begin it or another to drop it, ends it."""

    def __init__(self, submission: Submission, src_blocks: Blocks, dst_blocks: Blocks, immediate: int) -> None:
        self.submission = submission
        self.src_blocks = src_blocks
        self.dst_blocks = dst_blocks
        self.notification = ARRIVED.pack(immediate, len(src_blocks))
        self._claim = threading.Lock()

    def claim(self) -> bool:
        return self._claim.acquire(blocking=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """A part is over: `num_bytes` 0 where it was not begun, its peer is gone, or `error` says what went wrong."""

    part: Part
    num_bytes: int = 0
    seconds: float = 0.0
    finished_s: float = field(default_factory=time.monotonic)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Up:
    """A rail can write to a peer: told once for each rail and link."""

    link: Link


Event = Ended | Up | Arrived


@dataclass(slots=True)
class _Flight:
    """A part that has begun; `handle` is None while, and if, it cannot be posted."""

    part: Part
    began_s: float = field(default_factory=time.monotonic)
    handle: Any = None


class _Way:
    """How far one rail is with one peer: not connected, greeting, or up."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.connection: Connection | None = None
        self.greeting: Any = None
        self.tried_s = -math.inf
        self.was_up = False
        self.is_failing = False  # since it was last up
        self.is_overdue = False
        self.waiting: deque[Part] = deque()
        self.flights: list[_Flight] = []
        self.broken: list[Part] = []  # begun on a connection that was lost: some of their bytes may still come through
        self.error = ""  # that lost it

    @property
    def is_up(self) -> bool:
        return self.connection is not None and self.greeting is None

    @property
    def is_due(self) -> bool:
        return bool(self.flights) or (self.greeting is not None and not self.is_overdue)


class Rail:
    """Writes to any number of peers. It sleeps while nothing is under way; an error of one peer is no other's."""

    def __init__(self, agent: WritingAgent, done: Done[Event]) -> None:
        self._agent = agent
        self._done = done
        self._ways: dict[Link, _Way] = {}
        self._is_closed = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="flowkv-nixl-write", daemon=True)
        self._thread.start()

    def connect(self, link: Link) -> None:
        self._commands.put(partial(self._open, link))

    def disconnect(self, link: Link) -> None:
        self._commands.put(partial(self._drop, link))

    def submit(self, link: Link, part: Part) -> None:
        """`link` must be connected."""
        self._commands.put(partial(self._queue, link, part))

    def close(self) -> None:
        self._commands.put(self._stop)
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            for way in self._ways.values():
                self._advance(way)
            with contextlib.suppress(queue.Empty):
                self._commands.get(timeout=self._patience_s())()
        for link in list(self._ways):
            self._drop(link)
        self._agent.close()

    def _patience_s(self) -> float | None:
        """How long to wait for a command before looking at what is under way."""
        if any(way.is_due for way in self._ways.values()):
            return POLL_INTERVAL_S
        return None if all(way.is_up for way in self._ways.values()) else _RETRY_S / 10

    def _open(self, link: Link) -> None:
        self._ways[link] = _Way(link)

    def _queue(self, link: Link, part: Part) -> None:
        self._ways[link].waiting.append(part)

    def _stop(self) -> None:
        self._is_closed = True

    def _drop(self, link: Link) -> None:
        """What is queued ends unsent; of what is under way nobody knows how much came through."""
        way = self._ways.pop(link)
        self._take_down(way)
        self._end_broken(way)
        for part in way.waiting:
            if part.claim():
                self._done.put(Ended(part))

    def _advance(self, way: _Way) -> None:
        """Do what can be done now."""
        try:
            if way.connection is None and time.monotonic() - way.tried_s > _RETRY_S:
                way.tried_s, way.is_overdue = time.monotonic(), False
                way.connection = Connection(self._agent, way.link.endpoint, way.link.num_blocks)
                way.greeting = way.connection.greet()
            if way.connection is not None and way.greeting is not None:
                self._await_greeting(way, way.connection)
            if way.connection is not None and way.greeting is None:
                self._write(way, way.connection)
        except self._agent.errors as error:
            self._fail(way, error)

    def _fail(self, way: _Way, error: Exception) -> None:
        """A peer that is dead is known to be soon; one that is not comes back."""
        level = logging.DEBUG if way.is_failing else logging.WARNING
        _logger.log(level, "the pool of %s cannot be written to: %r; trying again", way.link.peer, error)
        way.is_failing = True
        way.error = f"writing to {way.link.peer} failed: {error!r}"
        self._take_down(way)

    def _await_greeting(self, way: _Way, connection: Connection) -> None:
        if connection.is_done(way.greeting):
            way.greeting, way.is_failing = None, False
            self._end_broken(way)
            if not way.was_up:
                way.was_up = True
                self._done.put(Up(way.link))
        elif not way.is_overdue and time.monotonic() - way.tried_s > _OVERDUE_S:
            way.is_overdue = True
            _logger.warning("the pool of %s does not answer; waiting for it", way.link.peer)

    def _write(self, way: _Way, connection: Connection) -> None:
        while way.waiting:
            part = way.waiting.popleft()
            if part.claim():
                way.flights.append(flight := _Flight(part))
                flight.handle = connection.write(part.src_blocks, part.dst_blocks, part.notification)
        for flight in list(way.flights):
            if connection.is_done(flight.handle):
                way.flights.remove(flight)
                self._land(flight)

    def _land(self, flight: _Flight) -> None:
        now_s = time.monotonic()
        num_bytes = len(flight.part.src_blocks) * self._agent.block_bytes
        self._done.put(Ended(flight.part, num_bytes, now_s - flight.began_s, now_s))

    def _take_down(self, way: _Way) -> None:
        if way.connection is not None:
            way.connection.close()
        way.broken += [flight.part for flight in way.flights]
        way.connection = way.greeting = None
        way.flights = []

    def _end_broken(self, way: _Way) -> None:
        """The peer has answered on a new connection, after all that it had got on the old one; or it is dead."""
        for part in way.broken:
            self._done.put(Ended(part, error=way.error or None))
        way.broken = []
