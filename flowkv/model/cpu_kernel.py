"""The attention kernel for CPUs (docs/decisions/0002): decoding reads the pool in place, chunks go through torch."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from flowkv.model import bf16_kernels, numba_kernels
from flowkv.model.kernels import masked_attention, visible
from flowkv.model.packing import PackedBatch

BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
Float32Array = NDArray[np.float32]
SOFTCAP_ROWS = 64  # query tokens whose scores are held at once where the soft-cap keeps torch's fused kernel away


class Rotation(NamedTuple):
    """What a layer does to the heads of queries and keys. cos, sin [P, D / 2]; weights [D], empty where heads are not
    normed; all float32."""

    cos: Float32Array
    sin: Float32Array
    query_weight: Float32Array
    key_weight: Float32Array
    eps: np.float32


class CpuKernel:
    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self.bits = storage_view(pool)  # the pool, as the compiled loops take it
        can_pair = pool.dtype == torch.bfloat16 and pool.shape[5] % 2 == 0
        self._has_products = can_pair and bf16_kernels.is_supported()

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, layer: int, batch: PackedBatch) -> None:
        numba_kernels.write_kv(
            storage_view(key.to(self._pool.dtype).contiguous()),
            storage_view(value.to(self._pool.dtype).contiguous()),
            self.bits,
            layer,
            batch.slot_blocks,
            batch.slot_offsets,
        )

    def rotate_and_write(
        self, qkv: torch.Tensor, num_heads: int, layer: int, batch: PackedBatch, rotation: "Rotation"
    ) -> torch.Tensor:
        """Query [T, H, D] with its positions, of qkv [T, (H + 2 Hkv) * D] in the pool's dtype; KV goes to the pool."""
        query = torch.empty((len(qkv), num_heads, self._pool.shape[5]), dtype=qkv.dtype)
        numba_kernels.rotate_and_write(
            storage_view(qkv), batch.positions, rotation.cos, rotation.sin, rotation.query_weight, rotation.key_weight,
            rotation.eps, storage_view(query), self.bits, layer, batch.slot_blocks, batch.slot_offsets,
        )  # fmt: skip
        return query

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        batch: PackedBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        query = query.contiguous()
        out = torch.empty_like(query)
        if len(batch.decode_rows):
            numba_kernels.decode(
                storage_view(query), np.float32(scale), self.bits, layer, batch.decode_rows, batch.decode_items,
                batch.block_tables, batch.context_tokens, window or 0, np.float32(softcap or 0.0), storage_view(out),
            )  # fmt: skip
        for item in batch.chunk_items:
            chunk = slice(int(batch.query_starts[item]), int(batch.query_starts[item + 1]))
            out[chunk] = self._chunk(query[chunk], layer, batch, item, scale, window, softcap)
        return out

    def _chunk(
        self,
        query: torch.Tensor,
        layer: int,
        batch: PackedBatch,
        item: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """One stretch of several tokens, query [t, H, D] -> [t, H, D]."""
        stop = int(batch.context_tokens[item])
        start = stop - len(query)
        first = 0 if window is None else max(0, start + 1 - window)
        if self._has_products and query.dtype == torch.bfloat16:
            out = torch.empty_like(query)
            bf16_kernels.attend_chunk(
                storage_view(query), self.bits, layer, batch.block_tables[item], start, first, np.float32(scale),
                window or 0, np.float32(softcap or 0.0), storage_view(out),
            )  # fmt: skip
            return out
        key, value = self._gather(layer, batch, item, first, stop)
        if softcap is not None:
            return capped_attention(query, key, value, scale, start, stop, first, window, softcap)
        plain = first == start and (window is None or window >= len(query))
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None].to(key.dtype),
            key[None],
            value[None],
            attn_mask=None if plain else additive_mask(start, stop, first, window, key.dtype),
            is_causal=plain,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def _gather(
        self, layer: int, batch: PackedBatch, item: int, first: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of positions `first` to `stop` of one sequence, [Hkv, stop - first, D] each."""
        shape = (2, self._pool.shape[4], stop - first, self._pool.shape[5])
        both = torch.empty(shape, dtype=self._pool.dtype)
        key, value = storage_view(both)
        numba_kernels.gather_kv(self.bits, layer, batch.block_tables[item], first, key, value)
        return both[0], both[1]


def storage_view(tensor: torch.Tensor) -> Any:
    """A NumPy view; bfloat16 as uint16, float16 as int16 (`flowkv.model.numba_kernels`)."""
    bits = BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).detach().numpy()


@lru_cache(maxsize=2)  # one step asks for the same mask once a layer; models that mix windows, for two
def additive_mask(start: int, stop: int, first: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    hidden = ~visible(start, stop, first, window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    start: int,
    stop: int,
    first: int,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    """As `masked_attention`, for key, value [Hkv, C, D], a few query tokens at a time."""
    seen = visible(start, stop, first, window)
    parts = zip(torch.split(query, SOFTCAP_ROWS), torch.split(seen, SOFTCAP_ROWS), strict=True)
    keys, values = key.transpose(0, 1), value.transpose(0, 1)
    return torch.cat([masked_attention(part, keys, values, scale, rows, softcap) for part, rows in parts])
