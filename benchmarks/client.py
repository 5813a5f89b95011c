"""A streaming OpenAI client that costs little: one connection a request, events stamped as their bytes arrive.

The load generator shares its cores with the server it measures, so it must be cheap. With 64 streams open one event
costs 20 to 40 us of a 2025 server core, where httpx and its line iterator take 90 to 100. `benchmarks/serve.py` reports
the share of a core that it used.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

import httptools
import msgspec

from benchmarks import BenchmarkError
from flowkv.sim.figures import Record, RunResult


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_decode_event = msgspec.json.Decoder(_Event).decode
_REFUSED = 429


@dataclass(slots=True)
class Answer:
    """What the client saw of one request; times in seconds on one monotonic clock."""

    sent_s: float = 0.0
    late_s: float = 0.0  # sent this long after it was due: the load generator's own fault
    event_s: list[float] = field(default_factory=list)  # arrival of each event that brought text
    finished_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    status: int = 0  # of HTTP; 0 where no answer came
    retry_after: str | None = None

    @property
    def is_refused(self) -> bool:
        return self.status == _REFUSED

    @property
    def itl_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.event_s)]

    def record(self, index: int, start_s: float = 0.0) -> Record:
        """Its place in the figures of a run that began at `start_s`. First and last text stand for the tokens."""
        return Record(
            index=index,
            arrival_s=self.sent_s - start_s,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            ttft_s=self.event_s[0] - self.sent_s if self.event_s else None,
            e2el_s=self.event_s[-1] - self.sent_s if self.event_s else None,
            error=self.error,
            is_refused=self.is_refused,
        )


def run_of(answers: Sequence[Answer], duration_s: float, start_s: float = 0.0) -> RunResult:
    """What `figures` takes, of the answers of one run."""
    return RunResult([answer.record(i, start_s) for i, answer in enumerate(answers)], gaps_s(answers), duration_s)


def gaps_s(answers: Iterable[Answer]) -> list[float]:
    """Every gap between two events of a whole answer."""
    return [gap for answer in answers if answer.error is None for gap in answer.itl_s]


class Client:
    """Sends streaming requests to one server. Raises BenchmarkError for a URL that is not `http://node[:port]`."""

    def __init__(self, url: str, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None or parts.path not in ("", "/"):
            raise BenchmarkError(f"{url!r} is not of the form http://node[:port]")
        self._node = parts.hostname
        self._port = parts.port or 80
        self._timeout_s = timeout_s

    def encode(self, path: str, body: Mapping[str, object]) -> bytes:
        """The bytes of one request; made before the clock starts, since a long prompt takes milliseconds."""
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        content = msgspec.json.encode({**body, **streaming})
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._node}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + content

    async def send(self, request: bytes, on_text: Callable[[str], None] | None = None) -> Answer:
        """Send what `encode` made and follow the answer to its end; every failure is told in `Answer.error`."""
        answer = Answer(sent_s=time.perf_counter())
        loop = asyncio.get_running_loop()
        exchange = _Exchange(answer, on_text, loop.create_future())
        try:
            async with asyncio.timeout(self._timeout_s):
                transport, _ = await loop.create_connection(lambda: exchange, self._node, self._port)
                try:
                    transport.write(request)
                    await exchange.done
                finally:
                    transport.abort()
        except TimeoutError:
            answer.error = f"no end after {self._timeout_s:g} s"
        except OSError as error:
            answer.error = f"connection failed: {error}"
        answer.finished_s = time.perf_counter()
        return answer


class _Exchange(asyncio.Protocol):
    """One answer. `done` is resolved at its end, the answer's error set where it was not a whole stream."""

    def __init__(self, answer: Answer, on_text: Callable[[str], None] | None, done: "asyncio.Future[None]") -> None:
        self.done = done
        self._answer = answer
        self._on_text = on_text
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._now_s = 0.0
        self._complete = False  # [DONE] has come

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # httptools wraps what a callback raises, and keeps it as the context.
            self._finish(f"not an answer: {error.__context__ or error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish("the server closed the connection in the middle of the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._answer.retry_after = value.decode()

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._rest += body
        if self._parser.get_status_code() == 200:
            *events, self._rest = self._rest.split(b"\n\n")
            for event in events:
                self._take(event)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._finish(f"HTTP {status}: {_error_message(self._rest)}")
        else:
            self._finish(None if self._complete else "the stream ended without [DONE]")

    def _take(self, event: bytes) -> None:
        if not event.startswith(b"data:"):
            return  # a comment that keeps the connection alive
        data = event[5:].strip()
        if data == b"[DONE]":
            self._complete = True
            return
        parsed = _decode_event(data)
        if parsed.error is not None:
            self._finish(parsed.error.message)
        if parsed.usage is not None:
            self._answer.num_prompt_tokens = parsed.usage.prompt_tokens
            self._answer.num_output_tokens = parsed.usage.completion_tokens
        for choice in parsed.choices:
            self._add(choice)

    def _add(self, choice: _Choice) -> None:
        text = choice.text or (choice.delta.content if choice.delta else None)
        self._answer.finish_reason = choice.finish_reason or self._answer.finish_reason
        if text:
            self._answer.event_s.append(self._now_s)
            self._answer.text += text
            if self._on_text is not None:
                self._on_text(text)

    def _finish(self, error: str | None) -> None:
        if not self.done.done():
            self._answer.error = error
            self.done.set_result(None)


def _error_message(body: bytes) -> str:
    """The OpenAI error's message, or the start of whatever came instead."""
    try:
        error = _decode_event(body).error
    except msgspec.MsgspecError:
        error = None
    return error.message if error is not None else body[:200].decode(errors="replace")
