"""Loops over the KV pool that torch has no operator for, compiled for the CPU they run on.

Storage types as in `flowkv.model.simd`. Compiled code is cached on disk beside this file, or in the user's cache
folder where that cannot be written.
"""

from typing import Any

import numba
import numpy as np

from flowkv.model.simd import FASTMATH, add_weighted_rows, dot_rows, exp_nonpositive, prefetch

LOWEST = np.float32(-1e30)


@numba.njit(nogil=True, cache=True)
def write_kv(key: Any, value: Any, pool: Any, layer: int, blocks: Any, offsets: Any) -> None:
    """key, value [T, Hkv, D] into slots (blocks[t], offsets[t]) of pool [B, L, 2, S, Hkv, D]."""
    for token in range(key.shape[0]):
        block, offset = blocks[token], offsets[token]
        for head in range(key.shape[1]):
            for d in range(key.shape[2]):
                pool[block, layer, 0, offset, head, d] = key[token, head, d]
                pool[block, layer, 1, offset, head, d] = value[token, head, d]


@numba.njit(nogil=True, cache=True)
def gather_kv(pool: Any, layer: int, table: Any, start: int, key: Any, value: Any) -> None:
    """Positions from `start` on of one sequence, out of the pool into key, value [Hkv, n, D]."""
    block_size = pool.shape[3]
    for i in range(key.shape[1]):
        block, offset = table[(start + i) // block_size], (start + i) % block_size
        for head in range(key.shape[0]):
            for d in range(key.shape[2]):
                key[head, i, d] = pool[block, layer, 0, offset, head, d]
                value[head, i, d] = pool[block, layer, 1, offset, head, d]


@numba.njit(nogil=True, cache=True, fastmath=FASTMATH)
def decode(
    query: Any, pool: Any, layer: int, rows: Any, items: Any, tables: Any, contexts: Any,
    window: int, softcap: Any, out: Any,
) -> None:  # fmt: skip
    """Attention of single-token stretches into out [T, H, D], straight from the pool's blocks.

    query [T, H, D] float32, scaled already. Blocks are the outer loop and heads the inner, so that memory is read in
    order, and each KV head's rows serve its whole group of query heads from the cache. The softmax is online, block
    after block. `window` and `softcap` 0 mean none.
    """
    num_layers, block_size, num_kv_heads, head_dim = pool.shape[1], pool.shape[3], pool.shape[4], pool.shape[5]
    num_heads = query.shape[1]
    group = num_heads // num_kv_heads
    flat_pool, flat_query, flat_out = pool.reshape(-1), query.reshape(-1), out.reshape(-1)
    stride = num_kv_heads * head_dim
    half = block_size * stride  # from a slot's K to its V
    share = 2 * half // num_heads  # of the next block, asked for with each head
    score = np.empty(block_size, np.float32)
    highest, weight = np.empty(num_heads, np.float32), np.empty(num_heads, np.float32)
    for i in range(len(rows)):
        context = contexts[items[i]]
        first = max(0, context - window) if window > 0 else 0
        base = rows[i] * num_heads * head_dim
        flat_out[base : base + num_heads * head_dim] = np.float32(0.0)
        highest[:], weight[:] = LOWEST, np.float32(0.0)
        last = (context + block_size - 1) // block_size
        for index in range(first // block_size, last):
            low = max(0, first - index * block_size)
            count = min(block_size, context - index * block_size) - low
            start = (np.intp(tables[items[i], index]) * num_layers + layer) * 2 * half + low * stride
            following = np.intp(tables[items[i], min(index + 1, last - 1)]) * num_layers + layer
            for head in range(num_heads):
                prefetch(flat_pool, following * 2 * half + head * share, share)
                key, place = start + head // group * head_dim, base + head * head_dim
                dot_rows(score, 0, flat_query, place, flat_pool, key, stride, count, head_dim)
                shrink = absorb(score[:count], head, highest, weight, softcap)
                add_weighted_rows(flat_out, place, shrink, score, 0, flat_pool, key + half, stride, count, head_dim)
        for head in range(num_heads):
            for d in range(base + head * head_dim, base + (head + 1) * head_dim):
                flat_out[d] /= weight[head]


@numba.njit(inline="always", fastmath=FASTMATH)
def absorb(score: Any, head: int, highest: Any, weight: Any, softcap: Any) -> Any:
    """One block's scores into a head's running softmax: they become weights. Returns by how much older sums shrink."""
    if softcap > 0:
        for t in range(len(score)):
            score[t] = softcap * np.tanh(score[t] / softcap)
    peak = highest[head]
    for t in range(len(score)):
        peak = max(peak, score[t])
    shrink = exp_nonpositive(highest[head] - peak)
    added = np.float32(0.0)
    for t in range(len(score)):
        score[t] = exp_nonpositive(score[t] - peak)
        added += score[t]
    highest[head] = peak
    weight[head] = weight[head] * shrink + added
    return shrink
