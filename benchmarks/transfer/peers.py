"""Benchmark 2: NIXL as vLLM drives it, and FlowKV's transport over NIXL, on the same blocks of the same pools.

vLLM's default is a READ by the decode side (NixlPullConnector) with one descriptor for every layer's K and V of every
block; it can also WRITE (NixlPushConnector), and lay its cache out block-major: one descriptor a block. A WRITE ends
when the target has seen its notification, a READ when it is done where it was posted, which is the decode side: what
tells that side to begin is not counted. Over TCP a raw socket sends as many consecutive bytes: the limit.
"""

import time
from itertools import product
from random import Random
from typing import Literal, NamedTuple, Protocol

import msgspec

from benchmarks.transfer import pools
from benchmarks.transfer.engines import EngineSide, open_nixl
from benchmarks.transfer.geometry import (
    LAST,
    LLAMA_8B,
    PROMPTS,
    Blocks,
    Calls,
    Order,
    Rung,
    block_ids,
    descriptor_indices,
    descriptors,
    pool_blocks_for,
    runs_of,
)
from benchmarks.transfer.nixl_agents import NixlAgent, Request
from benchmarks.transfer.raw_socket import RawSockets
from benchmarks.transfer.sides import Channel, Reporter
from flowkv.kv.layout import KvLayout
from flowkv.kv.pool import KvPool

# (streams, kernel buffers of each in bytes, 0: those that grow by themselves)
RAW_VARIANTS = ((1, 0), (1, 128 << 10), (1, 256 << 10), (1, 4 << 20), (2, 0), (2, 128 << 10))


class Options(msgspec.Struct, frozen=True, kw_only=True):
    layout: KvLayout = LLAMA_8B
    prompts: tuple[int, ...] = PROMPTS
    turns: int = 4
    has_progress_thread: bool = False
    num_threads: int = 0
    has_ours: bool = True
    has_huge_pages: bool = False  # private memory, as a framework allocates it, not a pool that others can map
    raw_address: str = ""  # of the target, where a raw socket is to be measured too

    @property
    def pool_blocks(self) -> int:
        return pool_blocks_for(self.layout, self.prompts)


class Case(msgspec.Struct, frozen=True):
    """`system`: nixl (by hand), flowkv (`NixlTransfer`) or raw (so many sockets as `num_streams`)."""

    system: Literal["nixl", "flowkv", "raw"]
    blocks: Blocks
    order: Order = Order.BLOCK_MAJOR
    operation: str = "WRITE"
    num_streams: int = 1
    socket_bytes: int = 0

    @property
    def name(self) -> str:
        match self.system:
            case "nixl":
                return f"NIXL {self.operation}, {self.order}"
            case "flowkv":
                return "FlowKV over NIXL"
            case "raw":
                buffers = f"{self.socket_bytes >> 10} KiB" if self.socket_bytes else "default"
                return f"{self.num_streams} raw socket{'s' * (self.num_streams > 1)}, {buffers} buffers"


class Sample(msgspec.Struct, frozen=True):
    turn: int
    num_tokens: int
    case: Case
    seconds: float


class Step(NamedTuple):
    turn: int  # -1: untimed, its bytes are checked
    num_tokens: int
    case: Case


def cases(options: Options) -> list[Case]:
    found = [Case("nixl", blocks, order, op) for blocks, order, op in product(Blocks, Order, ("READ", "WRITE"))]
    if options.has_ours:
        found += [Case("flowkv", blocks) for blocks in Blocks]
    if options.raw_address:
        found += [Case("raw", Blocks.SEGMENTS, num_streams=count, socket_bytes=size) for count, size in RAW_VARIANTS]
    return found


def schedule(options: Options) -> list[Step]:
    rng = Random("peers")
    steps = []
    for turn in range(-1, options.turns):
        for num_tokens in options.prompts:
            part = [Step(turn, num_tokens, case) for case in cases(options)]
            rng.shuffle(part)
            steps += part
    return steps


class _Party(Protocol):
    """One side of one system. `start` is None where the other side knows it."""

    def act(self, step: Step, number: int) -> tuple[float | None, float | None]: ...

    def get_ready(self, number: int) -> None: ...

    def close(self) -> None: ...


class _Nixl:
    def __init__(self, options: Options, pool: KvPool, side: str, channel: Channel) -> None:
        self._options, self._is_source = options, side == "source"
        self._agent = NixlAgent(
            f"peer-{side}", pool, has_progress_thread=options.has_progress_thread, num_threads=options.num_threads
        )
        self._agent.connect(channel, self._is_source)
        every = {order: descriptors(order, options.layout, options.pool_blocks) for order in Order}
        self._lists = {order: self._agent.prepare(rows, rows) for order, rows in every.items()}

    def get_ready(self, number: int) -> None:
        """The agent sees whatever comes."""

    def act(self, step: Step, number: int) -> tuple[float | None, float | None]:
        tag = b"%d" % number
        if (step.case.operation == "WRITE") is not self._is_source:
            return None, self._agent.await_notification(tag)
        started_s, ended_s = self._agent.run(self._request(step), tag)
        return started_s, None if self._is_source else ended_s

    def close(self) -> None:
        for pair in self._lists.values():
            for handle in pair:
                handle.release()
        self._agent.close()

    def _request(self, step: Step) -> Request:
        layout, pool_blocks, case = self._options.layout, self._options.pool_blocks, step.case
        sides = ("source", "target") if self._is_source else ("target", "source")
        mine, theirs = (
            block_ids(layout.num_blocks_for(step.num_tokens), pool_blocks, case.blocks, side) for side in sides
        )
        indices = (descriptor_indices(case.order, ids, layout, pool_blocks) for ids in (mine, theirs))
        return Request(case.operation, self._lists[case.order], *indices)


class _FlowKv:
    def __init__(self, options: Options, pool: KvPool, side: str, channel: Channel) -> None:
        self._options, self._is_source = options, side == "source"
        self._side = EngineSide(open_nixl(f"flowkv-{side}", pool, options.layout.fingerprint))
        self._side.connect(channel)

    def get_ready(self, number: int) -> None:
        if not self._is_source:
            self._side.engine.expect(number)

    def act(self, step: Step, number: int) -> tuple[float | None, float | None]:
        num_blocks = self._options.layout.num_blocks_for(step.num_tokens)
        if not self._is_source:
            return None, self._side.await_arrival(number, num_blocks)
        runs = runs_of(Rung(Order.BLOCK_MAJOR, step.case.blocks, Calls.RUNS), num_blocks, self._options.pool_blocks)
        return self._side.send(runs, number), None

    def close(self) -> None:
        self._side.close()


class _Raw:
    def __init__(self, options: Options, pool: KvPool, side: str, channel: Channel) -> None:
        self._options, self._is_source, self._pool = options, side == "source", pool
        self._sockets = {
            variant: RawSockets(channel, options.raw_address, *variant, self._is_source) for variant in RAW_VARIANTS
        }

    def get_ready(self, number: int) -> None:
        """The sockets are there."""

    def act(self, step: Step, number: int) -> tuple[float | None, float | None]:
        layout = self._options.layout
        num_blocks = layout.num_blocks_for(step.num_tokens)
        run = runs_of(LAST, num_blocks, self._options.pool_blocks)[0]
        first = (run.src_block if self._is_source else run.dst_block) * layout.block_bytes
        part = self._pool.buffer[first : first + num_blocks * layout.block_bytes]
        sockets = self._sockets[step.case.num_streams, step.case.socket_bytes]
        started_s = time.monotonic()
        if self._is_source:
            sockets.send(part)
            return started_s, None
        sockets.receive(part)
        return None, time.monotonic()

    def close(self) -> None:
        for sockets in self._sockets.values():
            sockets.close()


def _open(options: Options, pool: KvPool, side: str, channel: Channel) -> dict[str, _Party]:
    parties: dict[str, _Party] = {"nixl": _Nixl(options, pool, side, channel)}
    if options.has_ours:
        parties["flowkv"] = _FlowKv(options, pool, side, channel)
    if options.raw_address:
        parties["raw"] = _Raw(options, pool, side, channel)
    return parties


def run_source(options: Options, channel: Channel, reporter: Reporter) -> list[Sample]:
    pool = pools.source_pool(options.layout, options.pool_blocks, options.has_huge_pages)
    parties = _open(options, pool, "source", channel)
    samples, steps = [], schedule(options)
    for number, step in enumerate(steps, 1):
        channel.exchange(number)
        my_start_s, _ = parties[step.case.system].act(step, number)
        their_start_s, ended_s = channel.receive()
        started_s = my_start_s if their_start_s is None else their_start_s
        if step.turn >= 0:
            samples.append(Sample(step.turn, step.num_tokens, step.case, ended_s - started_s))
        reporter.progress(number / len(steps), f"peers: {step.num_tokens} tokens, {step.case.name}")
    channel.exchange("over")
    for party in parties.values():
        party.close()
    return samples


def run_target(options: Options, channel: Channel) -> None:
    pool = pools.target_pool(options.layout, options.pool_blocks, options.has_huge_pages)
    parties = _open(options, pool, "target", channel)
    for number, step in enumerate(schedule(options), 1):
        case = step.case
        if step.turn < 0:
            pools.clear(pool, options.layout)
        parties[case.system].get_ready(number)
        channel.exchange(number)
        channel.send(parties[case.system].act(step, number))
        if step.turn < 0:
            runs = runs_of(Rung(case.order, case.blocks, Calls.RUNS), _num_blocks(options, step), options.pool_blocks)
            pools.check(pool, options.layout, case.order, runs, case.name)
    channel.exchange("over")
    for party in parties.values():
        party.close()


def _num_blocks(options: Options, step: Step) -> int:
    return options.layout.num_blocks_for(step.num_tokens)
