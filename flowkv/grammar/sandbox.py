"""Grammars of strangers, compiled where it does not matter if they never end: in a process that can be lost.

Fuel bounds what llguidance counts. What it does not count, such as whether the intersection of many regular expressions
is empty, can take years.
"""

import os
import signal
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from flowkv.errors import GrammarError
from flowkv.grammar.worker import CPU_S, read_frame, write_frame
from flowkv.types import Grammar

# What a large grammar took stays in a worker's heap, so one that has grown is followed by another. How large it is
# before is the tokenizer's and the platform's: some 30 MiB here.
MAX_GROWN_BYTES = 24 * 2**20


@dataclass(slots=True, weakref_slot=True)
class _Worker:
    process: "subprocess.Popen[bytes]"
    requests: BinaryIO
    verdicts: BinaryIO
    first_bytes: int = 0  # resident, when it had read its tokenizer

    def has_grown(self) -> bool:
        return _resident_bytes(self.process.pid) - self.first_bytes > MAX_GROWN_BYTES


class Sandbox:
    """For one thread. The process starts with the first grammar, and ends with this object or with its process."""

    def __init__(self, tokenizer: str) -> None:
        """`tokenizer` as `vocabulary.small_tokenizer` makes it."""
        self._tokenizer = tokenizer
        self._worker: _Worker | None = None

    def check(self, grammar: Grammar) -> None:
        """Raises `GrammarError` where it cannot be compiled, or takes too much time or memory."""
        worker = self._worker
        if worker is None or worker.process.poll() is not None:
            worker = self._worker = _launched()
        try:
            if not worker.first_bytes:
                self._prepare(worker)
            write_frame(worker.requests, msgspec.msgpack.encode(grammar))
            verdict = read_frame(worker.verdicts)
        except BrokenPipeError:
            verdict = None
        if verdict is None:
            raise GrammarError(_how(worker.process.wait()))
        if worker.has_grown():
            self._worker = None
        if verdict:
            raise GrammarError(verdict.decode())

    def _prepare(self, worker: _Worker) -> None:
        write_frame(worker.requests, self._tokenizer.encode())
        read_frame(worker.verdicts)
        worker.first_bytes = _resident_bytes(worker.process.pid)


def _launched() -> _Worker:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "flowkv.grammar.worker"],  # no code of the current directory
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    worker = _Worker(process, process.stdin, process.stdout)  # type: ignore[arg-type]
    weakref.finalize(worker, _end, process)
    return worker


def _how(code: int) -> str:
    """It ended, by its exit code."""
    if code == -signal.SIGPROF:
        return f"it takes more than {CPU_S} s to compile"
    return f"the process that compiles it ended with code {code}: it takes too much memory, perhaps"


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()
