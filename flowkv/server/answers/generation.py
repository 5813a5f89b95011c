"""The HTTP answer to one generation: streamed or whole, and aborted when its client goes away."""

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from flowkv.errors import RequestError
from flowkv.server.answers.envelope import ResponseFormat
from flowkv.server.answers.meter import TokenMeter
from flowkv.server.choice import Delta
from flowkv.server.records.timeline import server_timing
from flowkv.server.stream import RequestStream
from flowkv.types import FinishReason

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
TIMELINE_HEADER = b"x-flowkv-timeline"  # of a request that wants to know where its time went
JSON_HEADERS = [(b"content-type", b"application/json")]


class GenerationResponse:
    """An ASGI application for one request whose body has been read.

    The status line waits for the first token, so that a request that the cluster refuses gets its true status:
    such a `RequestError` leaves `__call__`; once streaming has begun it becomes an event of the stream.
    """

    def __init__(
        self,
        stream: RequestStream,
        shape: ResponseFormat,
        meter: TokenMeter,
        num_choices: int,
        *,
        streamed: bool,
    ) -> None:
        self._stream = stream
        self._shape = shape
        self._meter = meter
        self._num_choices = num_choices
        self._streamed = streamed
        self._wants_timeline = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._wants_timeline = any(name == TIMELINE_HEADER for name, _ in scope["headers"])
        watch = asyncio.create_task(self._watch(receive))
        try:
            await (self._send_stream(send) if self._streamed else self._send_whole(send))
        finally:
            watch.cancel()
            self._stream.abort()  # nothing to do where it has ended

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stream.abort()

    async def _send_stream(self, send: Send) -> None:
        deltas = await anext(self._stream, None)
        if deltas is None:  # gone before the first token
            return
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        async for event in self._events(deltas):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        ending = self._shape.ending(self._meter.usage)
        if self._wants_timeline:  # a comment of the stream: clients that do not know of it pass over it
            ending = b": server-timing " + self._server_timing() + b"\n\n" + ending
        await send({"type": "http.response.body", "body": ending, "more_body": False})

    async def _events(self, deltas: list[Delta]) -> AsyncIterator[bytes]:
        yield self._show(deltas)
        try:
            async for following in self._stream:
                yield self._show(following)
        except RequestError as error:
            yield self._shape.failure(error)

    def _show(self, deltas: list[Delta]) -> bytes:
        return b"".join([self._show_one(delta) for delta in deltas])

    def _show_one(self, delta: Delta) -> bytes:
        self._meter.count(delta)
        return self._shape.events(delta, self._meter.usage)

    async def _send_whole(self, send: Send) -> None:
        reasons: list[FinishReason | None] = [None] * self._num_choices
        async for deltas in self._stream:
            for delta in deltas:
                self._meter.count(delta)
                self._shape.collect(delta)
                reasons[delta.choice] = delta.finish_reason
        if None in reasons:
            raise ClientDisconnect
        if FinishReason.ABORT in reasons:  # the server stops: a part must not be taken for the whole
            raise RequestError("the request was aborted", status=503, code="aborted")
        body = self._shape.whole(self._meter.usage)
        headers = [*JSON_HEADERS, (b"content-length", str(len(body)).encode())]
        if self._wants_timeline:
            headers.append((b"server-timing", self._server_timing()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _server_timing(self) -> bytes:
        """Of what is over."""
        return server_timing(timeline.record(0.0) for timeline in self._stream.timelines if timeline.is_over).encode()
