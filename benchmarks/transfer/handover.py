"""Benchmark 4: what lies between the first token, from P, and the second, from D, beyond one decode step.

Two real instances (`paced`), whose prefill and decode steps take a stated time; this process stands for controller and
frontend, and takes the times at which tokens reach it. The exposed transfer time of a request is what P's counters
say that it spent moving bytes after the last chunk was computed.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import msgspec
import zmq

from benchmarks import BenchmarkError
from benchmarks.transfer import paced
from benchmarks.transfer.geometry import LLAMA_8B, PROMPTS
from benchmarks.transfer.sides import Progress
from flowkv.kv.layout import KvLayout
from flowkv.messages import Abort, Dispatch, LoadReport, Message, Outputs, PeerUp, Register, Registered, StartFailed
from flowkv.types import InstanceCounters, Request, Role, SamplingParams
from flowkv.wire import Mailbox, Outbox, SyncContext

P, D = "prefill-0", "decode-0"
_TIMEOUT_S = 60.0
_SETTLE_S = 0.05  # between requests: idle means that everybody sleeps
_BUSY_TOKENS = 320  # of a request that keeps D busy; another takes its place when it ends


class Options(msgspec.Struct, frozen=True, kw_only=True):
    layout: KvLayout = LLAMA_8B
    prompts: tuple[int, ...] = PROMPTS
    backends: tuple[str, ...] = ("shm", "nixl")
    turns: int = 20
    long_turns: int = 8  # of prompts of more than `long_prompt` tokens
    long_prompt: int = 4_000
    prefill_tokens_per_s: float = 20_000.0
    decode_step_s: float = 0.010
    num_busy: int = 4  # requests that D decodes where it is busy

    @property
    def num_blocks(self) -> int:
        busy = self.num_busy * (2 + self.layout.num_blocks_for(_BUSY_TOKENS + 16))
        return self.layout.num_blocks_for(max(self.prompts)) + busy + 8


@dataclass(frozen=True, slots=True)
class Condition:
    is_d_busy: bool
    is_p_spinning: bool  # its core is kept busy while it prefills

    @property
    def name(self) -> str:
        return f"D {'busy' if self.is_d_busy else 'idle'}, P {'computes' if self.is_p_spinning else 'waits'}"


CONDITIONS = (Condition(False, False), Condition(False, True), Condition(True, False))


class Sample(msgspec.Struct, frozen=True):
    backend: str
    num_tokens: int
    condition: str
    second_token_s: float  # after the first
    transfer_s: float  # spent moving, of which ...
    exposed_s: float  # ... after the last chunk
    num_calls: int
    num_bytes: int


def schedule(options: Options) -> list[tuple[Condition, int]]:
    """Turn by turn, so that what else the machine does falls on all alike."""
    return [
        (condition, num_tokens)
        for turn in range(options.turns)
        for condition in CONDITIONS
        for num_tokens in options.prompts
        if num_tokens <= options.long_prompt or turn < options.long_turns
    ]


def measure(options: Options, progress: Progress) -> list[Sample]:
    samples = []
    steps = schedule(options)
    for backend in options.backends:
        with _cluster(options, backend) as conductor:
            for num_tokens in options.prompts:  # a first pass that nobody times
                conductor.run_request(backend, CONDITIONS[0], num_tokens)
            for i, (condition, num_tokens) in enumerate(steps):
                conductor.keep_busy(options.num_busy if condition.is_d_busy else 0)
                samples.append(conductor.run_request(backend, condition, num_tokens))
                progress((i + 1) / len(steps), f"hand-over: {num_tokens} tokens over {backend}, {condition.name}")
    return samples


@contextlib.contextmanager
def _cluster(options: Options, backend: str) -> Iterator["Conductor"]:
    context = SyncContext()
    with tempfile.TemporaryDirectory(prefix="flowkv-") as folder:
        mailbox, outbox = Mailbox(context, f"ipc://{folder}/conductor"), Outbox(context)
        processes = [_start(options, backend, folder, mailbox.address, name, role) for name, role in _ROLES]
        try:
            conductor = Conductor(options, mailbox, outbox)
            conductor.await_links()
            yield conductor
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
            outbox.close()
            mailbox.close()
            context.term()


_ROLES = ((P, Role.PREFILL), (D, Role.DECODE))


def _start(
    options: Options, backend: str, folder: str, conductor: str, name: str, role: Role
) -> subprocess.Popen[bytes]:
    theirs = paced.Options(
        name=name,
        role=role,
        backend=backend,
        folder=folder,
        conductor=conductor,
        num_blocks=options.num_blocks,
        prefill_tokens_per_s=options.prefill_tokens_per_s,
        decode_step_s=options.decode_step_s,
        layout=options.layout,
    )
    command = [sys.executable, "-m", "benchmarks.transfer.paced", msgspec.json.encode(theirs).decode()]
    return subprocess.Popen(command)


@dataclass(slots=True)
class _Seen:
    """What reached the conductor of one request."""

    token_s: dict[int, float] = field(default_factory=dict)  # by output index
    is_finished: bool = False


class Conductor:
    """Controller, frontend and launcher of two instances, as far as they need any."""

    def __init__(self, options: Options, mailbox: Mailbox, outbox: Outbox) -> None:
        self._options = options
        self._mailbox = mailbox
        self._outbox = outbox
        self._peers: dict[str, Register] = {}
        self._links: dict[str, bool] = {}
        self._counters: dict[str, InstanceCounters] = {}
        self._seen: dict[str, _Seen] = {}
        self._busy: list[str] = []  # ids of the requests that keep D busy
        self._numbers = count(1)

    def await_links(self) -> None:
        self._wait(lambda: len(self._peers) == len(_ROLES), "both instances to register")
        for name in self._peers:
            self._send(name, Registered())
            for other, theirs in self._peers.items():
                if other != name:
                    self._send(name, PeerUp(theirs.peer))
        self._wait(lambda: all(self._links.get(name) for name, _ in _ROLES), "links")

    def keep_busy(self, num_requests: int) -> None:
        """Have D decode so many requests of its own. A word to D for each that begins or ends."""
        while len(self._busy) > num_requests:
            request_id = self._busy.pop()
            self._send(D, Abort(request_id))
        while len(self._busy) < num_requests:
            self._busy.append(self._start_busy(len(self._busy)))
        self._wait(lambda: all(self._seen[name].token_s for name in self._busy), "D to be busy")

    def run_request(self, backend: str, condition: Condition, num_tokens: int) -> Sample:
        """One request through both instances, and what it cost."""
        self._pause(_SETTLE_S)
        before = self._counters[P]
        prefix = paced.SPIN_PREFIX if condition.is_p_spinning else "wait"
        request_id = self._dispatch(P, prefix, num_tokens, 3, [D])
        seen = self._seen[request_id]
        num_bytes = self._options.layout.num_blocks_for(num_tokens) * self._options.layout.block_bytes
        self._wait(
            lambda: seen.is_finished and self._counters[P].transfer_bytes - before.transfer_bytes >= num_bytes,
            "the tokens",
        )
        after = self._counters[P]
        return Sample(
            backend,
            num_tokens,
            condition.name,
            seen.token_s[1] - seen.token_s[0],
            after.transfer_seconds - before.transfer_seconds,
            after.transfer_exposed_seconds - before.transfer_exposed_seconds,
            after.transfer_calls - before.transfer_calls,
            after.transfer_bytes - before.transfer_bytes,
        )

    def _start_busy(self, index: int) -> str:
        max_tokens = _BUSY_TOKENS * (index + 1) // self._options.num_busy  # their ends are spread out
        return self._dispatch(D, "busy", 16, max(2, max_tokens), [])

    def _dispatch(self, instance: str, prefix: str, num_tokens: int, max_tokens: int, decoders: Sequence[str]) -> str:
        number = next(self._numbers)
        request_id = f"{prefix}-{number}"
        self._seen[request_id] = _Seen()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = Request(request_id=request_id, prompt_ids=[paced.TOKEN] * num_tokens, sampling=sampling)
        self._send(instance, Dispatch(number, request, self._mailbox.address, list(decoders)))
        return request_id

    def _send(self, instance: str, message: Message) -> None:
        self._outbox.send(self._peers[instance].peer.address, message)

    def _wait(self, is_done: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not is_done():
            if time.monotonic() > deadline_s:
                raise BenchmarkError(f"waited {_TIMEOUT_S:g} s for {what}")
            self._receive(0.1)

    def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._receive(left_s)

    def _receive(self, timeout_s: float) -> None:
        if self._mailbox.socket.poll(round(timeout_s * 1000) or 1, zmq.POLLIN):
            now_s = time.monotonic()
            for message in self._mailbox.receive_all():
                self._take(message, now_s)

    def _take(self, message: Message, now_s: float) -> None:
        match message:
            case Register():
                self._peers[message.peer.instance] = message
            case LoadReport():
                self._counters[message.instance] = message.counters
                self._links[message.instance] = bool(message.links)
            case Outputs():
                self._take_outputs(message, now_s)
            case StartFailed():
                raise BenchmarkError(f"{message.process}: {message.reason}")

    def _take_outputs(self, message: Outputs, now_s: float) -> None:
        for output in message.outputs:
            if output.error is not None:
                raise BenchmarkError(f"{output.request_id}: {output.error}")
            seen = self._seen[output.request_id]
            seen.token_s[output.index] = now_s
            if output.finish_reason is not None:
                seen.is_finished = True
                if output.request_id in self._busy:
                    self._busy[self._busy.index(output.request_id)] = self._start_busy(self._options.num_busy - 1)
