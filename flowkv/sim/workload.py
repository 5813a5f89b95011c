"""Requests to send: when each one arrives, how long it is, and what it shares with others.

Two kinds of trace are read: Mooncake's JSON lines (`timestamp` ms, `input_length`, `output_length`, `hash_ids`:
requests with the same hash share those 512 tokens) and Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens). Both
are long for a small model on a small machine: `scaled` shrinks prompts, outputs and shared blocks alike.

What is drawn at random comes from a seed alone: the same arguments give the same requests, bit for bit. Arrivals never
go backwards.
"""

import gzip
import math
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from flowkv.errors import WorkloadError

MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_GZIP_MAGIC = b"\x1f\x8b"

Length = Annotated[int, msgspec.Meta(ge=1, le=10**9)]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload. Without `hash_ids` the prompt is shared with nobody."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: float = MOONCAKE_BLOCK_TOKENS  # prompt tokens that one hash id stands for; a fraction once scaled
    priority: int = 0  # of those that wait, lower ones go first


# --- traces --------------------------------------------------------------------------------------------------------


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e15)]
    input_length: Length
    output_length: Length
    hash_ids: list[int]


class _AzureLine(msgspec.Struct):
    TIMESTAMP: str
    ContextTokens: Length
    GeneratedTokens: Length


def read_trace(path: Path) -> list[TraceRequest]:
    """A Mooncake or Azure trace, gzipped or not, told apart by what is in it; the first request arrives at 0 s.

    Raises WorkloadError naming file and line for anything that is not such a trace: a broken line, lengths below one
    token, times that go backwards, an empty file.
    """
    try:
        with _open(path) as lines:
            requests = list(_in_order(path, _parse(path, lines)))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorkloadError(f"{path}: cannot be read: {reason}") from error
    if not requests:
        raise WorkloadError(f"{path}: no request in it")
    return requests


def _open(path: Path) -> AbstractContextManager[Iterable[bytes]]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP_MAGIC
    return gzip.open(path) if is_gzip else path.open("rb")


def _parse(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, TraceRequest]]:
    """(line number, request) of every line that is one; arrivals count from the first."""
    numbered = enumerate(lines, 1)
    _, first = next(numbered, (1, b""))
    if first.lstrip().startswith(b"{"):
        yield 1, _mooncake_request(path, 1, first)
        for number, line in numbered:
            yield number, _mooncake_request(path, number, line)
    elif first.strip() == ",".join(AZURE_COLUMNS).encode():
        yield from _azure_requests(path, numbered)
    elif first:
        raise WorkloadError(
            f"{path}:1: neither a Mooncake trace (a JSON object a line) nor an Azure one ({','.join(AZURE_COLUMNS)})"
        )


def _in_order(path: Path, numbered: Iterable[tuple[int, TraceRequest]]) -> Iterator[TraceRequest]:
    start_s = last_s = None
    for number, request in numbered:
        start_s = request.arrival_s if start_s is None else start_s
        if last_s is not None and request.arrival_s < last_s:
            raise WorkloadError(f"{path}:{number}: arrives {last_s - request.arrival_s:g} s before the one above it")
        last_s = request.arrival_s
        yield replace(request, arrival_s=request.arrival_s - start_s)


_decode_mooncake = msgspec.json.Decoder(_MooncakeLine).decode


def _mooncake_request(path: Path, number: int, text: bytes) -> TraceRequest:
    try:
        line = _decode_mooncake(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}:{number}: not a Mooncake request: {error}") from error
    num_hashes = math.ceil(line.input_length / MOONCAKE_BLOCK_TOKENS)
    if len(line.hash_ids) != num_hashes:
        raise WorkloadError(
            f"{path}:{number}: {line.input_length} prompt tokens take {num_hashes} hash_ids of"
            f" {MOONCAKE_BLOCK_TOKENS}, not {len(line.hash_ids)}"
        )
    return TraceRequest(line.timestamp / 1000, line.input_length, line.output_length, tuple(line.hash_ids))


def _azure_requests(path: Path, numbered: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, TraceRequest]]:
    first: datetime | None = None
    for number, text in numbered:
        try:
            named = dict(zip(AZURE_COLUMNS, text.decode().rstrip("\r\n").split(","), strict=True))
            line = msgspec.convert(named, _AzureLine, strict=False)
            arrival = datetime.fromisoformat(line.TIMESTAMP)
        except ValueError as error:  # msgspec's errors and those of decoding are ValueErrors too
            raise WorkloadError(f"{path}:{number}: not an Azure request: {error}") from error
        if arrival.tzinfo is None:  # a local clock would go back once a year
            arrival = arrival.replace(tzinfo=UTC)
        first = arrival if first is None else first
        yield number, TraceRequest((arrival - first).total_seconds(), line.ContextTokens, line.GeneratedTokens)


# --- lengths -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """`128` or `64:256`. Raises ValueError."""
        low, _, high = text.partition(":")
        lengths = cls(int(low), int(high or low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} is not a range of lengths of at least 1")
        return lengths

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Tokens of this arithmetic mean, and standard deviation `sigma` of their logarithm (0: all alike)."""

    mean: float
    sigma: float = 0.0

    def draw(self, rng: random.Random) -> int:
        mu = math.log(self.mean) - self.sigma**2 / 2
        return max(1, round(rng.lognormvariate(mu, self.sigma)))


# --- changing workloads --------------------------------------------------------------------------------------------


def scaled(requests: Sequence[TraceRequest], scale_length: float, speedup: float) -> list[TraceRequest]:
    """Lengths and shared blocks times `scale_length` (at least one token), arrivals `speedup` times as fast."""

    def shrink(num_tokens: int) -> int:
        return max(1, round(num_tokens * scale_length))

    return [
        replace(
            request,
            arrival_s=request.arrival_s / speedup,
            num_prompt_tokens=shrink(request.num_prompt_tokens),
            num_output_tokens=shrink(request.num_output_tokens),
            block_tokens=request.block_tokens * scale_length,
        )
        for request in requests
    ]


def clipped(requests: Sequence[TraceRequest], max_total_tokens: int) -> tuple[list[TraceRequest], int]:
    """Prompts (and, where that is not enough, outputs) cut to what the server takes, and how many requests were cut."""
    kept = []
    for request in requests:
        num_output = min(request.num_output_tokens, max_total_tokens - 1)
        num_prompt = min(request.num_prompt_tokens, max_total_tokens - num_output)
        kept.append(replace(request, num_prompt_tokens=num_prompt, num_output_tokens=num_output))
    return kept, sum(new != old for new, old in zip(kept, requests, strict=True))


def repeated(requests: Sequence[TraceRequest], count: int, speedup: float = 1.0) -> Iterator[TraceRequest]:
    """`count` requests with the lengths of these, over and over, arriving `speedup` times as fast; made one by one.

    One pass takes the trace's own time and one mean gap. Prompts are shared with nobody.
    """
    last_s = requests[-1].arrival_s
    period_s = last_s + last_s / max(1, len(requests) - 1)
    for index in range(count):
        passed, at = divmod(index, len(requests))
        request = requests[at]
        arrival_s = (passed * period_s + request.arrival_s) / speedup
        yield TraceRequest(arrival_s, request.num_prompt_tokens, request.num_output_tokens, priority=request.priority)


def with_poisson_arrivals(requests: Sequence[TraceRequest], rate: float, seed: int) -> list[TraceRequest]:
    """The same requests in the same order, `rate` a second on average, at random; an infinite rate is all at once."""
    rng = random.Random(f"arrivals/{seed}")
    arrival_s = 0.0
    moved = []
    for request in requests:
        moved.append(replace(request, arrival_s=arrival_s))
        arrival_s += rng.expovariate(rate) if math.isfinite(rate) else 0.0
    return moved


def prompt_ids(request: TraceRequest, index: int, vocab: Lengths, seed: int) -> list[int]:
    """Token ids of the prompt: a function of the hash ids where the request has them, else of its `index`.

    Block `k` covers positions `round(k * block_tokens)` to `round((k + 1) * block_tokens)`, so that what two requests
    share in the trace they share after scaling.
    """
    if not request.hash_ids:
        return _random_ids(f"{seed}/request/{index}", request.num_prompt_tokens, vocab)
    ids: list[int] = []
    for k, hash_id in enumerate(request.hash_ids):
        stop = min(round((k + 1) * request.block_tokens), request.num_prompt_tokens)
        ids += _random_ids(f"{seed}/hash/{hash_id}", stop - len(ids), vocab)
    # Rounding, and the one token that a prompt has at least, may leave a rest.
    return ids + _random_ids(f"{seed}/rest/{index}", request.num_prompt_tokens - len(ids), vocab)


def _random_ids(key: str, count: int, vocab: Lengths) -> list[int]:
    if count <= 0:
        return []
    rng = random.Random(key)
    width = vocab.high - vocab.low + 1
    return [vocab.low + int(rng.random() * width) for _ in range(count)]


# --- making workloads ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests of one shape, `rate` a second."""

    rate: float
    prompt: LogNormal
    output: LogNormal


# Two loads that want opposite splits: long prompts with short answers, and the reverse.
SHIFT_PHASES = (
    Phase(24.0, LogNormal(8000, 0.3), LogNormal(100, 0.3)),
    Phase(40.0, LogNormal(500, 0.3), LogNormal(1000, 0.3)),
)

TOKENS_PER_WORD = 1.35  # assumed: English prose under a vocabulary of 128,000 ids

# Mean words a document: LongBench (Bai et al. 2023, arXiv 2308.14508), table 1. Its spread is shown there only as a
# histogram of the whole benchmark, so sigma is assumed: wide for articles gathered from the news, narrower for reports
# of one kind and for transcripts of meetings.
LONGBENCH_PROMPTS = {
    "gov_report": LogNormal(8734 * TOKENS_PER_WORD, 0.5),
    "multi_news": LogNormal(2113 * TOKENS_PER_WORD, 0.7),
    "qmsum": LogNormal(10614 * TOKENS_PER_WORD, 0.5),
}
LONGBENCH_OUTPUT_TOKENS = 512


def synthetic(num_requests: int, prompt: Lengths, output: Lengths, seed: int) -> list[TraceRequest]:
    """Requests of drawn lengths that all arrive at once."""
    rng = random.Random(f"lengths/{seed}")
    return [TraceRequest(0.0, prompt.draw(rng), output.draw(rng)) for _ in range(num_requests)]


def poisson(rate: float, duration_s: float, prompt: LogNormal, output: LogNormal, seed: int) -> list[TraceRequest]:
    """Arrivals with no memory, `rate` a second, until `duration_s`."""
    return bursts(rate, 1.0, duration_s, prompt, output, seed)


def bursts(
    rate: float, burstiness: float, duration_s: float, prompt: LogNormal, output: LogNormal, seed: int
) -> list[TraceRequest]:
    """Gaps of a gamma distribution with shape `burstiness` and mean `1 / rate` (as `--burstiness` of vLLM's benchmark).

    1 is Poisson; the further below, the more come together; the further above, the more evenly.
    """
    rng = random.Random(f"bursts/{seed}")
    return list(_until(Phase(rate, prompt, output), burstiness, 0.0, duration_s, rng))


def shifting(phases: Sequence[Phase], phase_s: float, duration_s: float, seed: int) -> list[TraceRequest]:
    """The phases in turns of `phase_s` until `duration_s`, each with Poisson arrivals."""
    rng = random.Random(f"shifting/{seed}")
    requests: list[TraceRequest] = []
    for turn in range(math.ceil(duration_s / phase_s)):
        stop_s = min((turn + 1) * phase_s, duration_s)
        requests += _until(phases[turn % len(phases)], 1.0, turn * phase_s, stop_s, rng)
    return requests


def shift_test(scale_rate: float, seed: int, phase_s: float = 300.0, duration_s: float = 1800.0) -> list[TraceRequest]:
    """`SHIFT_PHASES` in turns, both rates times `scale_rate`."""
    phases = [replace(phase, rate=phase.rate * scale_rate) for phase in SHIFT_PHASES]
    return shifting(phases, phase_s, duration_s, seed)


def longbench(dataset: str, rate: float, duration_s: float, seed: int) -> list[TraceRequest]:
    """Prompts shaped like a data set of `LONGBENCH_PROMPTS`, each answered by 512 tokens; Poisson arrivals."""
    return poisson(rate, duration_s, LONGBENCH_PROMPTS[dataset], LogNormal(LONGBENCH_OUTPUT_TOKENS), seed)


def _until(
    phase: Phase, burstiness: float, start_s: float, stop_s: float, rng: random.Random
) -> Iterator[TraceRequest]:
    scale_s = 1 / (phase.rate * burstiness)
    arrival_s = start_s + rng.gammavariate(burstiness, scale_s)
    while arrival_s < stop_s:
        yield TraceRequest(arrival_s, phase.prompt.draw(rng), phase.output.draw(rng))
        arrival_s += rng.gammavariate(burstiness, scale_s)
