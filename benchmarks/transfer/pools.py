"""The two pools: known bytes in the source, and a check that they arrived in the target."""

import ctypes
import time
from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt

from benchmarks import BenchmarkError
from benchmarks.transfer.geometry import Offsets, Order, Plan, num_planes, piece_bytes
from flowkv.kv.layout import KvLayout
from flowkv.kv.pool import KvPool
from flowkv.transfer.plan import Run

Words = npt.NDArray[np.uint64]

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcpy.restype = ctypes.c_void_p


@numba.njit(nogil=True)
def _copy_calls(dst_address: int, src_address: int, dst: Offsets, src: Offsets, num_bytes: Offsets) -> None:
    for i in range(len(num_bytes)):
        _memcpy(dst_address + dst[i], src_address + src[i], num_bytes[i])


def address_of(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def copy_calls(dst_address: int, src_address: int, plan: Plan) -> None:
    """One libc memcpy a call, from compiled code without the GIL: a few nanoseconds of overhead each.

    Non-temporal stores (glibc's threshold lowered to 16 KiB) made scattered pieces of 32 KiB no faster.
    """
    _copy_calls(dst_address, src_address, plan.dst, plan.src, plan.num_bytes)


def memcpy(dst_address: int, src_address: int, num_bytes: int) -> None:
    """One call, without the GIL."""
    _memcpy(dst_address, src_address, num_bytes)


def touched(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Anonymous memory with every page present."""
    memory = np.empty(num_bytes, np.uint8)
    memory.fill(1)
    return memory


class HugePool(KvPool):
    """Private memory, in transparent huge pages where the kernel gives them: as a framework's tensors may be."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.buffer = touched(num_blocks * block_bytes).data


def _create(layout: KvLayout, num_blocks: int, has_huge_pages: bool) -> KvPool:
    if has_huge_pages:
        return HugePool(num_blocks, layout.block_bytes)
    return KvPool.create(num_blocks, layout.block_bytes)


def source_pool(layout: KvLayout, num_blocks: int, has_huge_pages: bool = False) -> KvPool:
    """A pool in which every piece holds its own number (plus one), wherever that lies in the layout."""
    pool = _create(layout, num_blocks, has_huge_pages)
    pieces = _pieces(pool.buffer, layout)
    pieces[:] = np.arange(1, len(pieces) + 1, dtype=np.uint64)[:, None]
    return pool


def target_pool(layout: KvLayout, num_blocks: int, has_huge_pages: bool = False) -> KvPool:
    pool = _create(layout, num_blocks, has_huge_pages)
    _pieces(pool.buffer, layout)[:] = 0
    return pool


def clear(pool: KvPool, layout: KvLayout) -> None:
    """Forget what arrived: zero the words that `check` looks at."""
    _pieces(pool.buffer, layout)[:, [0, -1]] = 0


def check(pool: KvPool, layout: KvLayout, order: Order, runs: Sequence[Run], what: str) -> None:
    """BenchmarkError unless the first and last word of every piece that `runs` names arrived in its place."""
    pieces = _pieces(pool.buffer, layout)[:, [0, -1]]
    src, dst = (np.concatenate([np.arange(run[i], run[i] + run.num_blocks) for run in runs]) for i in (0, 1))
    expected = _piece_numbers(order, src, layout, pool.num_blocks)
    found = pieces[_piece_numbers(order, dst, layout, pool.num_blocks)]
    if not (found == (expected + 1).astype(np.uint64)[:, None]).all():
        raise BenchmarkError(f"{what}: the bytes that arrived are not those that were sent")


def _piece_numbers(order: Order, blocks: Offsets, layout: KvLayout, pool_blocks: int) -> Offsets:
    planes = np.arange(num_planes(layout), dtype=np.int64)[:, None]
    numbers = blocks * len(planes) + planes if order is Order.BLOCK_MAJOR else planes * pool_blocks + blocks
    return numbers.ravel()


def _pieces(buffer: memoryview, layout: KvLayout) -> Words:
    return np.frombuffer(buffer, np.uint64).reshape(-1, piece_bytes(layout) // 8)


class Memcpy:
    """The limit: plain copies of anonymous memory, one thread, one call each."""

    def __init__(self, max_bytes: int) -> None:
        self._src, self._dst = touched(max_bytes), touched(max_bytes)

    def seconds(self, num_bytes: int) -> float:
        started_s = time.monotonic()
        memcpy(self._dst.ctypes.data, self._src.ctypes.data, num_bytes)
        return time.monotonic() - started_s
