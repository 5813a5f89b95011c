"""What it costs D to look for blocks that come over NIXL: CPU time of one process with one transfer engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.transfer.engines import open_nixl
from flowkv.kv.pool import KvPool

_POOL_BLOCKS, _POOL_BLOCK_BYTES = 8, 1 << 20
_SETTLE_S, _WATCH_S, _TURNS = 0.5, 2.0, 3


@dataclass(frozen=True, slots=True)
class Share:
    """CPU seconds a second, of one core, over each turn."""

    state: str
    of_a_core: list[float]


def measure(report: Callable[[float, str], None]) -> list[Share]:
    """Idle (nothing is due) and due (blocks are expected, none come), in turns."""
    pool = KvPool.create(_POOL_BLOCKS, _POOL_BLOCK_BYTES)
    engine = open_nixl("polling", pool, "benchmark")
    shares = [Share("idle", []), Share("blocks are expected", [])]
    for turn in range(_TURNS):
        for share, change in zip(shares, (engine.forget, engine.expect), strict=True):
            report(turn / _TURNS, f"polling: {share.state}")
            change(1)
            time.sleep(_SETTLE_S)
            share.of_a_core.append(_cpu_share())
    engine.close()
    return shares


def _cpu_share() -> float:
    """Of this process, all of its threads."""
    cpu_s, wall_s = time.process_time(), time.monotonic()
    time.sleep(_WATCH_S)
    return (time.process_time() - cpu_s) / (time.monotonic() - wall_s)
