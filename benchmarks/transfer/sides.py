"""Two processes, the source and the target of what is measured, and how this one starts them.

Both walk through the same schedule, so that what passes between them is only what one cannot know of the other, and a
word before each measurement. Nothing but bytes of msgpack is read from either.
"""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from benchmarks import BenchmarkError

_MAX_MESSAGE_BYTES = 2**17
_STOP_TIMEOUT_S = 10.0

Progress = Callable[[float, str], None]  # fraction in [0, 1], what is being done


class Channel:
    """What one side says to the other, in order."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, value: object) -> None:
        self._connection.sendall(msgspec.msgpack.encode(value))

    def receive(self) -> Any:
        """BenchmarkError where the other side has ended."""
        try:
            frame = self._connection.recv(_MAX_MESSAGE_BYTES)
        except ConnectionResetError:
            frame = b""  # it ended before it had read all that was sent to it
        if not frame:
            raise BenchmarkError("the other side has ended")
        return msgspec.msgpack.decode(frame)

    @property
    def is_readable(self) -> bool:
        return bool(select.select([self._connection], [], [], 0)[0])

    def exchange(self, value: object) -> Any:
        """Give something and take what the other side gives: also how the two wait for each other."""
        self.send(value)
        return self.receive()


class Reporter:
    """What the source tells the process that started it: lines of JSON."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "wb", buffering=0)

    def progress(self, fraction: float, text: str) -> None:
        self._file.write(msgspec.json.encode({"fraction": fraction, "text": text}) + b"\n")

    def result(self, result: object) -> None:
        self._file.write(msgspec.json.encode({"result": result}) + b"\n")


def run_pair(
    part: str,
    options: object,
    progress: Progress,
    *,
    prefixes: tuple[Sequence[str], Sequence[str]] = ((), ()),
    env: Mapping[str, str] | None = None,
) -> Any:
    """Run both sides of `part` (`benchmarks.transfer.side`) and return what the source reports.

    `prefixes` come before the two commands: `ip netns exec NAME`. BenchmarkError if a side fails.
    """
    source_end, target_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read_fd, write_fd = os.pipe()
    text = msgspec.json.encode(options).decode()
    processes = []
    try:
        for side, prefix, end in zip(("source", "target"), prefixes, (source_end, target_end), strict=True):
            fds = (end.fileno(), write_fd)
            command = [sys.executable, "-m", "benchmarks.transfer.side", part, side, text, *map(str, fds)]
            full_env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
            processes.append(subprocess.Popen([*prefix, *command], pass_fds=fds, env=full_env))
        for end in (source_end, target_end):
            end.close()
        os.close(write_fd)
        result = _follow(read_fd, progress)
    finally:
        codes = [_end(process) for process in processes]
    if result is None or any(codes):
        raise BenchmarkError(f"{part}: the source ended with code {codes[0]}, the target with {codes[1]}")
    return result


def _follow(fd: int, progress: Progress) -> Any:
    result = None
    with os.fdopen(fd, "rb") as lines:
        for line in lines:
            message = msgspec.json.decode(line)
            if "result" in message:
                result = message["result"]
            else:
                progress(message["fraction"], message["text"])
    return result


def _end(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
