"""Mooncake's transfer engine over TCP on the same blocks, in an interpreter of its own (`--mooncake-python`).

Its calls are synchronous: a time ends where the source is told, the target is told nothing. A call takes some 2,000 to
4,000 descriptors (its queue of a peer); the layer-by-layer list is cut into calls of 2,000, and tried whole as well.
"""

import json
import subprocess
from pathlib import Path

import msgspec

from benchmarks import BenchmarkError
from benchmarks.transfer.geometry import LLAMA_8B, Blocks, Calls, Order, Rung, plan_calls, pool_blocks_for, runs_of
from benchmarks.transfer.namespaces import Namespaces
from benchmarks.transfer.sides import Progress
from flowkv.kv.layout import KvLayout

_SCRIPT = Path(__file__).with_name("mooncake_side.py")
MAX_CALLS = 2_000  # descriptors, of one call
_WHOLE = 10**9


class Options(msgspec.Struct, frozen=True, kw_only=True):
    layout: KvLayout = LLAMA_8B
    prompts: tuple[int, ...] = (1_000, 4_000)
    turns: int = 3


class Sample(msgspec.Struct, frozen=True):
    """`error` where this could not be moved."""

    num_tokens: int
    operation: str
    order: Order
    blocks: Blocks
    num_descriptors: int
    max_calls: int
    seconds: list[float]
    error: str | None = None


def measure(options: Options, python: str, spaces: Namespaces, progress: Progress) -> list[Sample]:
    """BenchmarkError where Mooncake does not start."""
    num_bytes = str(pool_blocks_for(options.layout, options.prompts) * options.layout.block_bytes)
    sides = [
        subprocess.Popen(
            [*prefix, "env", "MC_FORCE_TCP=1", python, str(_SCRIPT), side, address, num_bytes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for side, prefix, address in zip(("source", "target"), spaces.prefixes, spaces.addresses, strict=True)
    ]
    source, target = sides
    try:
        _say(source, _hear(target))
        return _measure(options, source, progress)
    finally:
        for side in sides:
            side.kill()
            side.communicate()


def _measure(options: Options, source: "subprocess.Popen[str]", progress: Progress) -> list[Sample]:
    found = []
    cases = _cases(options)
    for i, (num_tokens, operation, rung, max_calls) in enumerate(cases):
        progress(i / len(cases), f"Mooncake: {num_tokens} tokens, {operation}, {rung.name}")
        pool_blocks = pool_blocks_for(options.layout, options.prompts)
        runs = runs_of(rung, options.layout.num_blocks_for(num_tokens), pool_blocks)
        plan = plan_calls(rung.order, runs, options.layout, pool_blocks)
        calls = [list(map(int, row)) for row in zip(*plan, strict=True)]
        case = {"name": operation, "calls": calls, "turns": options.turns, "max_calls": max_calls}
        _say(source, json.dumps(case))
        answer = json.loads(_hear(source))
        found.append(
            Sample(
                num_tokens, operation, rung.order, rung.blocks, len(calls), max_calls,
                answer.get("seconds", []), answer.get("error"),
            )
        )  # fmt: skip
    return found


def _cases(options: Options) -> list[tuple[int, str, Rung, int]]:
    """The whole list in one call comes last: after a call that failed its engine has failed later ones too."""
    rungs = (
        Rung(Order.PER_LAYER, Blocks.FREE_LIST, Calls.PER_BLOCK),
        Rung(Order.BLOCK_MAJOR, Blocks.FREE_LIST, Calls.PER_BLOCK),
        Rung(Order.BLOCK_MAJOR, Blocks.SEGMENTS, Calls.RUNS),
    )
    usual = [(n, op, rung, MAX_CALLS) for n in options.prompts for op in ("write", "read") for rung in rungs]
    return [*usual, (max(options.prompts), "write", rungs[0], _WHOLE)]


def _say(side: "subprocess.Popen[str]", line: str) -> None:
    assert side.stdin is not None
    side.stdin.write(line.rstrip("\n") + "\n")
    side.stdin.flush()


def _hear(side: "subprocess.Popen[str]") -> str:
    assert side.stdout is not None
    if not (line := side.stdout.readline()):
        raise BenchmarkError(f"Mooncake does not run under this interpreter (it ended with code {side.wait()})")
    return line
