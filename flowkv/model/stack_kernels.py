"""All layers of a bfloat16 decoder of the Llama family in one call."""

from typing import Any

import numpy as np

from flowkv.model.bf16_kernels import attend_chunk, gated_linear, linear
from flowkv.model.jit import compiled
from flowkv.model.numba_kernels import decode, rms_norm, rotate_and_write


@compiled(nogil=True)
def run_layers(
    hidden: Any, norm_weights: Any, eps: Any, head_norm_weights: Any, qkv: Any, qkv_bias: Any, attention_out: Any,
    attention_out_bias: Any, gated: Any, gated_bias: Any, down: Any, down_bias: Any, windows: Any, scale: Any,
    num_heads: int, num_inner: int, cos: Any, sin: Any, pool: Any, positions: Any, slot_blocks: Any, slot_offsets: Any,
    query_starts: Any, context_tokens: Any, block_tables: Any, decode_items: Any, decode_rows: Any, chunk_items: Any,
) -> None:  # fmt: skip
    """hidden [T, W] in place, bfloat16 as uint16; weights [L, ...] packed as `bf16_kernels` wants them.

    `norm_weights` [L, 2, W] are those before attention and before the MLP, `head_norm_weights` [L, 2, D] of queries and
    keys, or [L, 2, 0]; all float32, like biases, which are as long as the panels are wide. `windows` [L], 0 for none.
    The rest is a `PackedBatch` and the tables of angles.
    """
    num_tokens, width = hidden.shape
    head_dim = pool.shape[5]
    normed = np.empty((num_tokens, width), np.uint16)
    mixed = np.empty((num_tokens, (num_heads + 2 * pool.shape[4]) * head_dim), np.uint16)
    query = np.empty((num_tokens, num_heads, head_dim), np.uint16)
    seen = np.empty_like(query)
    inner = np.empty((num_tokens, num_inner), np.uint16)
    no_cap = np.float32(0.0)
    for layer in range(len(windows)):
        window = windows[layer]
        rms_norm(hidden, norm_weights[layer, 0], eps, normed)
        linear(normed, qkv[layer], qkv_bias[layer], None, mixed)
        rotate_and_write(
            mixed, positions, cos, sin, head_norm_weights[layer, 0], head_norm_weights[layer, 1], eps, query, pool,
            layer, slot_blocks, slot_offsets,
        )  # fmt: skip
        decode(
            query, scale, pool, layer, decode_rows, decode_items, block_tables, context_tokens, window, no_cap, seen
        )  # fmt: skip
        for item in chunk_items:
            begin, end, stop = query_starts[item], query_starts[item + 1], context_tokens[item]
            start = stop - (end - begin)
            first = max(0, start + 1 - window) if window > 0 else 0
            attend_chunk(
                query[begin:end], pool, layer, block_tables[item], start, first, scale, window, no_cap, seen[begin:end]
            )  # fmt: skip
        linear(
            seen.reshape((num_tokens, num_heads * head_dim)), attention_out[layer], attention_out_bias[layer], hidden,
            hidden,
        )  # fmt: skip
        rms_norm(hidden, norm_weights[layer, 1], eps, normed)
        gated_linear(normed, gated[layer], gated_bias[layer], inner)
        linear(inner, down[layer], down_bias[layer], hidden, hidden)
