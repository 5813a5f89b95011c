"""Benchmark 1: from a call for every layer's K and V of every block to one call, over `shm` and over `nixl`.

Every rung moves the same bytes between the same two pools and ends when the other process knows. Block-major rungs over
`shm` go through `ShmTransfer`; the layer-by-layer ones, which FlowKV cannot do, are a compiled loop over libc's memcpy,
followed by the same packet. Before every measurement stands a plain memcpy of that size: the limit.
"""

import struct
import tempfile
import time
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from benchmarks.transfer import pools
from benchmarks.transfer.engines import EngineSide, open_shm
from benchmarks.transfer.geometry import (
    LAST,
    LLAMA_8B,
    PROMPTS,
    RUNGS,
    Order,
    Plan,
    Rung,
    plan_calls,
    pool_blocks_for,
    runs_of,
)
from benchmarks.transfer.nixl_agents import NixlAgent, Request
from benchmarks.transfer.sides import Channel, Reporter
from flowkv.kv.layout import KvLayout
from flowkv.kv.pool import KvPool
from flowkv.transfer.plan import Run
from flowkv.transfer.shm import attach

_ARRIVED = struct.Struct("<QI")  # the packet of `transfer.shm`: immediate, number of blocks


class Options(msgspec.Struct, frozen=True, kw_only=True):
    layout: KvLayout = LLAMA_8B
    prompts: tuple[int, ...] = PROMPTS
    backends: tuple[str, ...] = ("shm", "nixl")
    rounds: int = 10
    long_rounds: int = 5  # of prompts of more than `long_prompt` tokens
    long_prompt: int = 4_000

    @property
    def pool_blocks(self) -> int:
        return pool_blocks_for(self.layout, self.prompts)


class Step(NamedTuple):
    """One measurement. `turn` -1 is the untimed first one, whose bytes are checked."""

    turn: int
    num_tokens: int
    backend: str
    rung: Rung


class Sample(msgspec.Struct, frozen=True):
    turn: int
    num_tokens: int
    backend: str
    rung: int  # its place in RUNGS
    seconds: float
    memcpy_s: float  # of as many bytes, just before, from anonymous to anonymous memory
    mapped_memcpy_s: float | None  # likewise, between the two pools; measured beside the last rung over `shm`


def schedule(options: Options) -> list[Step]:
    """Every rung of every backend in turn, in an order that changes, so that none has a constant neighbour."""
    steps = []
    rng = Random("ladder")
    for turn in range(-1, options.rounds):
        for num_tokens in options.prompts:
            if num_tokens > options.long_prompt and turn >= options.long_rounds:
                continue
            part = [Step(turn, num_tokens, backend, rung) for backend in options.backends for rung in RUNGS]
            rng.shuffle(part)
            steps += part
    return steps


class _Move(NamedTuple):
    runs: list[Run]
    plan: Plan

    @property
    def num_blocks(self) -> int:
        return sum(run.num_blocks for run in self.runs)


def _moves(options: Options) -> dict[tuple[int, Rung], _Move]:
    moves = {}
    for num_tokens in options.prompts:
        for rung in RUNGS:
            runs = runs_of(rung, options.layout.num_blocks_for(num_tokens), options.pool_blocks)
            plan = plan_calls(rung.order, runs, options.layout, options.pool_blocks)
            moves[num_tokens, rung] = _Move(runs, plan)
    return moves


class _Backend(Protocol):
    """Both ends of one way to move: `send` on the source, `await_arrival` on the target."""

    def send(self, rung: Rung, move: _Move, number: int) -> float: ...

    def get_ready(self, number: int) -> None: ...

    def await_arrival(self, move: _Move, number: int) -> float: ...

    def close(self) -> None: ...


class _Shm:
    def __init__(self, pool: KvPool, layout: KvLayout, folder: Path, side: str, channel: Channel) -> None:
        self._engine = EngineSide(open_shm(folder, side, pool, layout.fingerprint))
        peer = self._engine.connect(channel)
        self._packets, self._peer_pool = attach(peer.endpoints["shm"].decode(), pool.block_bytes)
        self._addresses = (pools.address_of(self._peer_pool.buffer), pools.address_of(pool.buffer))

    def send(self, rung: Rung, move: _Move, number: int) -> float:
        if rung.order is Order.BLOCK_MAJOR:
            return self._engine.send(move.runs, number)
        started_s = time.monotonic()
        pools.copy_calls(*self._addresses, move.plan)
        self._packets.sendall(_ARRIVED.pack(number, move.num_blocks))
        return started_s

    def get_ready(self, number: int) -> None:
        self._engine.engine.expect(number)

    def await_arrival(self, move: _Move, number: int) -> float:
        return self._engine.await_arrival(number, move.num_blocks)

    def mapped_memcpy_s(self, move: _Move) -> float:
        """Seconds of one memcpy between the two pools, as they are mapped here, with nobody told."""
        started_s = time.monotonic()
        pools.memcpy(*self._addresses, int(move.plan.num_bytes.sum()))
        return time.monotonic() - started_s

    def close(self) -> None:
        self._packets.close()
        self._engine.close()


class _Nixl:
    """NIXL by hand, so that every rung is the same but for its descriptors. Lists are prepared before the first use."""

    def __init__(self, pool: KvPool, side: str, channel: Channel) -> None:
        self._agent = NixlAgent(f"ladder-{side}", pool, has_progress_thread=False, num_threads=0)
        self._agent.connect(channel, is_initiator=side == "source")
        self._requests: dict[int, Request] = {}  # by id of the move

    def send(self, rung: Rung, move: _Move, number: int) -> float:
        if id(move) not in self._requests:
            self._requests[id(move)] = self._prepare(move.plan)
        return self._agent.run(self._requests[id(move)], b"%d" % number)[0]

    def get_ready(self, number: int) -> None:
        """The agent sees whatever comes."""

    def await_arrival(self, move: _Move, number: int) -> float:
        return self._agent.await_notification(b"%d" % number)

    def close(self) -> None:
        for request in self._requests.values():
            for handle in request.lists:
                handle.release()
        self._agent.close()

    def _prepare(self, plan: Plan) -> Request:
        every = np.arange(len(plan.num_bytes), dtype=np.int32)
        mine, theirs = (np.stack([offsets, plan.num_bytes], axis=1) for offsets in (plan.src, plan.dst))
        return Request("WRITE", self._agent.prepare(mine, theirs), every, every)


def _open(options: Options, pool: KvPool, side: str, folder: Path, channel: Channel) -> dict[str, _Backend]:
    opened: dict[str, _Backend] = {}
    for name in options.backends:
        opened[name] = (
            _Shm(pool, options.layout, folder, side, channel) if name == "shm" else _Nixl(pool, side, channel)
        )
    return opened


def run_source(options: Options, channel: Channel, reporter: Reporter) -> list[Sample]:
    layout = options.layout
    pool = pools.source_pool(layout, options.pool_blocks)
    limit = pools.Memcpy(layout.block_bytes * layout.num_blocks_for(max(options.prompts)))
    samples = []
    with tempfile.TemporaryDirectory(prefix="flowkv-") as folder:
        backends = _open(options, pool, "source", Path(folder), channel)
        moves, steps = _moves(options), schedule(options)
        for number, step in enumerate(steps, 1):
            move = moves[step.num_tokens, step.rung]
            memcpy_s = limit.seconds(int(move.plan.num_bytes.sum()))
            mapped_s = None
            if isinstance(backend := backends[step.backend], _Shm) and step.rung == LAST and step.turn >= 0:
                mapped_s = backend.mapped_memcpy_s(move)
            channel.exchange(number)
            started_s = backend.send(step.rung, move, number)
            ended_s = channel.receive()
            if step.turn >= 0:
                place, seconds = RUNGS.index(step.rung), ended_s - started_s
                samples.append(
                    Sample(step.turn, step.num_tokens, step.backend, place, seconds, memcpy_s, mapped_s)
                )  # fmt: skip
            reporter.progress(number / len(steps), f"ladder: {step.num_tokens} tokens over {step.backend}")
        channel.exchange("over")
        for backend in backends.values():
            backend.close()
    return samples


def run_target(options: Options, channel: Channel) -> None:
    layout = options.layout
    pool = pools.target_pool(layout, options.pool_blocks)
    with tempfile.TemporaryDirectory(prefix="flowkv-") as folder:
        backends = _open(options, pool, "target", Path(folder), channel)
        moves = _moves(options)
        for number, step in enumerate(schedule(options), 1):
            move = moves[step.num_tokens, step.rung]
            if step.turn < 0:
                pools.clear(pool, layout)
            backends[step.backend].get_ready(number)
            channel.exchange(number)
            channel.send(backends[step.backend].await_arrival(move, number))
            if step.turn < 0:
                pools.check(pool, layout, step.rung.order, move.runs, f"{step.rung.name} over {step.backend}")
        channel.exchange("over")
        for backend in backends.values():
            backend.close()
