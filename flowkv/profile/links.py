"""What it takes to move KV and messages between two processes of this machine."""

import time
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from statistics import median

import numpy as np

from flowkv.errors import FlowKVError
from flowkv.kv.pool import KvPool
from flowkv.launch.node import Node
from flowkv.messages import Abort
from flowkv.profile.fit import non_negative_least_squares
from flowkv.sim.costs import LinkSpeeds
from flowkv.transfer.base import TransferEngine
from flowkv.transfer.plan import Run
from flowkv.transfer.select import node_identity
from flowkv.transfer.shm import ShmTransfer
from flowkv.wire import Mailbox, Outbox, SyncContext

_NUM_BLOCKS = 256
_RUNS = ((1, 1), (1, 4), (1, 16), (1, 64), (4, 1), (16, 1), (64, 1), (4, 16))  # calls, blocks in each
_NUM_PINGS = 500
_ANSWER_TIMEOUT_S = 60  # the first time it has to start


def measure_links(node: Node, context: BaseContext, block_bytes: int, repeats: int) -> LinkSpeeds:
    """Between processes that do nothing else meanwhile; one more, of `context`, is started and ends with the node."""
    bytes_per_s, call_s = _measure_writes(node.run_folder, block_bytes, repeats)
    message_s = _measure_message_s(node, context)
    return LinkSpeeds(link_bytes_per_s=bytes_per_s, call_s=call_s, message_s=message_s)


# --- KV ------------------------------------------------------------------------------------------------------------


def _measure_writes(folder: Path, block_bytes: int, repeats: int) -> tuple[float, float]:
    """(bytes/s, seconds a call) of writes into shared memory: runs of the same bytes in more and in fewer calls."""
    pools = [KvPool.create(2 * _NUM_BLOCKS, block_bytes) for _ in range(2)]
    layout, node = "profile", node_identity()
    ends = [ShmTransfer(pool, f"{folder}/profile-{i}.pool", layout, node) for i, pool in enumerate(pools)]
    try:
        ends[0].connect("peer", ends[1].descriptor)
        while not ends[0].poll().linked:
            time.sleep(0.001)
        seconds = [(runs, _write_s(ends, *runs)) for _ in range(repeats) for runs in _RUNS]
    finally:
        for end in ends:
            end.close()
        for pool in pools:
            pool.close()
    return _speeds(seconds, block_bytes)


def _write_s(ends: Sequence[TransferEngine], num_calls: int, num_blocks: int) -> float:
    """Seconds that one write takes, by its own clock."""
    source, target = ends
    target.expect(1)
    stride = 2 * _NUM_BLOCKS // num_calls
    source.submit(1, "peer", [Run(i * stride, i * stride, num_blocks) for i in range(num_calls)], 1)
    while not (written := source.poll().written):
        time.sleep(0.0002)
    while not target.poll().arrived:
        time.sleep(0.0002)
    target.forget(1)
    return written[0].seconds


def _speeds(measured: Sequence[tuple[tuple[int, int], float]], block_bytes: int) -> tuple[float, float]:
    typical = [median(s for other, s in measured if other == runs) for runs in _RUNS]
    features = np.array([[calls, calls * blocks * block_bytes] for calls, blocks in _RUNS], dtype=np.float64)
    rows = features / np.array(typical)[:, None]
    scales = rows.max(axis=0)
    call_s, byte_s = (non_negative_least_squares(rows / scales, np.ones(len(_RUNS))) / scales).tolist()
    return 1.0 / max(byte_s, 1e-15), call_s


# --- messages ------------------------------------------------------------------------------------------------------


def _measure_message_s(node: Node, context: BaseContext) -> float:
    """Half of a median round trip to a process that answers at once."""
    here, there = node.ipc_address("ping"), node.ipc_address("pong")
    mailbox = Mailbox(node.context, here)
    try:
        node.children.start("pong", context, _answer, there, here)
        trips_s = [_round_trip_s(node, mailbox, there) for _ in range(_NUM_PINGS)]
    finally:
        mailbox.close()
    return median(trips_s[_NUM_PINGS // 5 :]) / 2


def _round_trip_s(node: Node, mailbox: Mailbox, address: str) -> float:
    began_s = time.perf_counter()
    node.outbox.send(address, Abort("ping"))
    if not mailbox.socket.poll(1000 * _ANSWER_TIMEOUT_S):
        raise FlowKVError(f"profile: a process that answers messages did not in {_ANSWER_TIMEOUT_S} s")
    mailbox.receive_all()
    return time.perf_counter() - began_s


def _answer(address: str, back: str) -> None:
    context = SyncContext()
    outbox = Outbox(context)
    mailbox = Mailbox(context, address)
    try:
        while True:
            mailbox.socket.poll()
            for message in mailbox.receive_all():
                outbox.send(back, message)
    finally:
        mailbox.close()
        outbox.close()
        context.term()
