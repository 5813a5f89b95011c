"""A fast HTTP/1.1 client, a process of its own: connections that send the next request as soon as one is answered.

`python -m benchmarks.gateways.client` reads a `Load` as JSON from stdin and writes `Answers` to stdout. What an answer
says is not read, beyond its status and where it ends.
"""

import asyncio
import resource
import sys
import time
from itertools import cycle
from typing import cast

import msgspec
import uvloop

HEADERS_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"


class Load(msgspec.Struct, frozen=True):
    host: str
    port: int
    path: str
    bodies: list[str]  # sent in turns
    num_connections: int
    warmup_s: float
    seconds: float


class Answers(msgspec.Struct, frozen=True):
    """Of those that were asked for and answered after the warm-up."""

    num_answers: int
    seconds: float
    latencies_s: list[float]
    first_bytes_s: list[float]  # until some of the body was there
    num_all: int  # with those of the warm-up
    failures: list[str]  # heads of answers that were no 200, and lost connections, at most a few
    cpu_s: float  # of this process, meanwhile


class Connection(asyncio.Protocol):
    def __init__(self, client: "Client") -> None:
        self._client = client
        self._buffer = bytearray()
        self._body_start: int | None = None
        self._num_bytes: int | None = None  # None: chunks
        self._first_s: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._body_start is None and not self._read_head():
            return
        assert self._body_start is not None
        if self._first_s is None and len(self._buffer) > self._body_start:
            self._first_s = time.perf_counter()
        if self._num_bytes is None:
            is_whole = self._buffer.endswith(_LAST_CHUNK)
        else:
            is_whole = len(self._buffer) >= self._body_start + self._num_bytes
        if is_whole:
            self._client.answered(self._asked_s, self._first_s, bytes(self._buffer[:200]))
            if self._client.is_over:
                self._transport.close()
            else:
                self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        self._client.lost(self)

    def _ask(self) -> None:
        self._buffer.clear()
        self._body_start = self._num_bytes = self._first_s = None
        self._asked_s = time.perf_counter()
        self._transport.write(next(self._client.requests))

    def _read_head(self) -> bool:
        end = self._buffer.find(HEADERS_END)
        if end < 0:
            return False
        self._body_start = end + len(HEADERS_END)
        head = bytes(self._buffer[:end]).lower()
        _, found, rest = head.partition(b"content-length:")
        self._num_bytes = int(rest.split(b"\r\n", 1)[0]) if found else None
        return True


class Client:
    def __init__(self, load: Load) -> None:
        self._load = load
        self.requests = cycle([_request(load, body.encode()) for body in load.bodies])
        self._latencies_s: list[float] = []
        self._first_bytes_s: list[float] = []
        self._num_all = 0
        self._failures: list[str] = []
        self._open: set[Connection] = set()
        self._is_measuring = self.is_over = False

    async def run(self) -> Answers:
        loop = asyncio.get_running_loop()
        for _ in range(self._load.num_connections):
            _, connection = await loop.create_connection(lambda: Connection(self), self._load.host, self._load.port)
            self._open.add(connection)
        await asyncio.sleep(self._load.warmup_s)
        self._is_measuring, start_s, start_cpu_s = True, time.perf_counter(), _cpu_s()
        await asyncio.sleep(self._load.seconds)
        self._is_measuring, self.is_over = False, True
        seconds, cpu_s = time.perf_counter() - start_s, _cpu_s() - start_cpu_s
        for _ in range(200):
            if not self._open:
                break
            await asyncio.sleep(0.05)
        return Answers(
            len(self._latencies_s), seconds, self._latencies_s, self._first_bytes_s, self._num_all, self._failures[:5],
            cpu_s,
        )  # fmt: skip

    def answered(self, asked_s: float, first_s: float | None, head: bytes) -> None:
        self._num_all += 1
        if not head.startswith(b"HTTP/1.1 200"):
            self._failures.append(head.decode(errors="replace"))
        if self._is_measuring:
            now_s = time.perf_counter()
            self._latencies_s.append(now_s - asked_s)
            self._first_bytes_s.append((now_s if first_s is None else first_s) - asked_s)

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if not self.is_over:
            self._failures.append("a connection was lost")


def _request(load: Load, body: bytes) -> bytes:
    head = (
        f"POST {load.path} HTTP/1.1\r\nHost: {load.host}:{load.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    answers = uvloop.run(Client(load).run())
    with open(sys.stdout.fileno(), "wb", closefd=False) as whole:  # with -u stdout may take a part only
        whole.write(msgspec.json.encode(answers))


if __name__ == "__main__":
    main()
