"""The deltas of all choices of one HTTP request, in the order of their arrival."""

import asyncio
from collections.abc import AsyncIterator, Callable

from flowkv.errors import RequestError
from flowkv.server.choice import Delta
from flowkv.server.records.timeline import Timeline


class RequestStream:
    """Iterate to get lists of deltas, each with all that came since the last; ends when every choice has ended.

    Raises `RequestError` where the cluster refuses one of the requests, or has lost one.
    """

    def __init__(self, num_choices: int, abort: Callable[[], None]) -> None:
        self._num_open = num_choices
        self._abort = abort
        self.timelines: list[Timeline] = []  # of its requests
        self._deltas: list[Delta] = []
        self.unread_bytes = 0  # of memory, about
        self._error: RequestError | None = None
        self._arrived = asyncio.Event()

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self.unread_bytes += delta.num_bytes
        if delta.finish_reason is not None:
            self._num_open -= 1
        self._arrived.set()

    def fail(self, error: RequestError) -> None:
        """What has arrived is still read first."""
        self._error = self._error or error
        self._arrived.set()

    def drop_unread(self) -> None:
        self._deltas.clear()
        self.unread_bytes = 0

    def abort(self) -> None:
        """The client has gone: stop every request of this stream, and end the iteration."""
        self._num_open = 0
        self._abort()
        self._arrived.set()

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self

    async def __anext__(self) -> list[Delta]:
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._num_open <= 0:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        deltas, self._deltas = self._deltas, []
        self.unread_bytes = 0
        return deltas
