"""Requests to send: when each one arrives, how long it is, and what it shares with others.

Two traces are read: Mooncake's JSON lines (`timestamp` ms, `input_length`, `output_length`, `hash_ids`: requests with
the same hash share those 512 tokens) and Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens). Both are long for a
small model on a small machine: `scale_length` shrinks prompts, outputs and shared blocks alike.
"""

import csv
import gzip
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated

import msgspec

from benchmarks import BenchmarkError

MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]

Positive = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload. Without `hash_ids` the prompt is shared with nobody."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: float = MOONCAKE_BLOCK_TOKENS  # prompt tokens that one hash id stands for; a fraction once scaled


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


# --- traces --------------------------------------------------------------------------------------------------------


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Positive
    output_length: Positive
    hash_ids: list[int]


class _AzureLine(msgspec.Struct):
    TIMESTAMP: str
    ContextTokens: Positive
    GeneratedTokens: Positive


def read_trace(path: Path) -> list[TraceRequest]:
    """A Mooncake (`.jsonl`) or Azure (`.csv`) trace, gzipped or not, by arrival from 0 s on.

    Raises BenchmarkError naming file and line for anything that is not such a trace.
    """
    readers = {".jsonl": _mooncake_requests, ".csv": _azure_requests}
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in readers:
        raise BenchmarkError(f"{path}: a trace is a .jsonl (Mooncake) or a .csv (Azure) file, gzipped or not")
    try:
        with _open(path) as file:
            requests = sorted(readers[kind](path, file), key=lambda request: request.arrival_s)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: cannot be read: {error}") from error
    if not requests:
        raise BenchmarkError(f"{path}: no request in it")
    return [replace(request, arrival_s=request.arrival_s - requests[0].arrival_s) for request in requests]


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="")


def _mooncake_requests(path: Path, lines: IO[str]) -> Iterator[TraceRequest]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, text in enumerate(lines, 1):
        try:
            line = decoder.decode(text)
        except msgspec.MsgspecError as error:
            raise BenchmarkError(f"{path}:{number}: not a Mooncake request: {error}") from error
        num_hashes = math.ceil(line.input_length / MOONCAKE_BLOCK_TOKENS)
        if len(line.hash_ids) != num_hashes:
            raise BenchmarkError(
                f"{path}:{number}: {line.input_length} prompt tokens take {num_hashes} hash_ids of"
                f" {MOONCAKE_BLOCK_TOKENS}, not {len(line.hash_ids)}"
            )
        yield TraceRequest(line.timestamp / 1000, line.input_length, line.output_length, tuple(line.hash_ids))


def _azure_requests(path: Path, lines: IO[str]) -> Iterator[TraceRequest]:
    rows = csv.reader(lines)
    header = next(rows, [])
    if header != AZURE_COLUMNS:
        raise BenchmarkError(f"{path}:1: the columns are not {','.join(AZURE_COLUMNS)}")
    for row in rows:
        try:
            named = dict(zip(AZURE_COLUMNS, row, strict=True))
            line = msgspec.convert(named, _AzureLine, strict=False)
            arrival_s = datetime.fromisoformat(line.TIMESTAMP).timestamp()
        except ValueError as error:  # msgspec's errors are ValueErrors too
            raise BenchmarkError(f"{path}:{rows.line_num}: not an Azure request: {error}") from error
        yield TraceRequest(arrival_s, line.ContextTokens, line.GeneratedTokens)


# --- changing and making workloads ---------------------------------------------------------------------------------


def synthetic(num_requests: int, prompt: Lengths, output: Lengths, seed: int) -> list[TraceRequest]:
    """Requests of drawn lengths that all arrive at once."""
    rng = random.Random(f"lengths/{seed}")
    return [TraceRequest(0.0, prompt.draw(rng), output.draw(rng)) for _ in range(num_requests)]


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


def with_poisson_arrivals(requests: Sequence[TraceRequest], rate: float, seed: int) -> list[TraceRequest]:
    """The same requests in the same order, `rate` a second on average, at random; an infinite rate is all at once."""
    rng = random.Random(f"arrivals/{seed}")
    arrival_s = 0.0
    moved = []
    for request in requests:
        moved.append(replace(request, arrival_s=arrival_s))
        arrival_s += rng.expovariate(rate) if math.isfinite(rate) else 0.0
    return moved


def clipped(requests: Sequence[TraceRequest], max_total_tokens: int) -> tuple[list[TraceRequest], int]:
    """Prompts (and, where that is not enough, outputs) cut to what the server takes, and how many requests were cut."""
    kept = []
    for request in requests:
        num_output = min(request.num_output_tokens, max_total_tokens - 1)
        num_prompt = min(request.num_prompt_tokens, max_total_tokens - num_output)
        kept.append(replace(request, num_prompt_tokens=num_prompt, num_output_tokens=num_output))
    return kept, sum(new != old for new, old in zip(kept, requests, strict=True))


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
