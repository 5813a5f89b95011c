"""The attention over a paged KV pool: what a kernel does, and the plain torch one that says what is right."""

from typing import Protocol

import torch

from flowkv.model.packing import PackedBatch, slots


class AttentionKernel(Protocol):
    """Holds the pool `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`; each call is for a layer."""

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, layer: int, batch: PackedBatch) -> None:
        """key, value [T, Hkv, D] of the batch's tokens go into their slots."""

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        batch: PackedBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """[T, H, D] for query [T, H, D]: each token sees the KV of its own sequence up to itself.

        With a window w it sees the last w tokens only, itself included. A soft-cap c turns a score s into
        c * tanh(s / c).
        """


class ReferenceKernel:
    """Gathers each sequence's KV and follows the formula in float32. Slow; runs on any device."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._block_size = pool.shape[3]

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, layer: int, batch: PackedBatch) -> None:
        blocks = torch.from_numpy(batch.slot_blocks).long().to(self._pool.device)
        offsets = torch.from_numpy(batch.slot_offsets).long().to(self._pool.device)
        self._pool[:, layer][blocks, :, offsets] = torch.stack((key, value), dim=1).to(self._pool.dtype)

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        batch: PackedBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for item, context in enumerate(batch.context_tokens.tolist()):
            rows = slice(int(batch.query_starts[item]), int(batch.query_starts[item + 1]))
            blocks, offsets = (
                torch.from_numpy(part).long().to(self._pool.device)
                for part in slots(batch, item, 0, context, self._block_size)
            )
            key, value = self._pool[:, layer][blocks, :, offsets].unbind(1)
            start = context - (rows.stop - rows.start)
            out[rows] = masked_attention(query[rows], key, value, scale, visible(start, context, 0, window), softcap)
        return out


def visible(start: int, stop: int, first: int, window: int | None) -> torch.Tensor:
    """[stop - start, stop - first], True where the query at position start + i sees the key at position first + j."""
    query = torch.arange(start, stop)[:, None]
    key = torch.arange(first, stop)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """query [T, H, D], key, value [C, Hkv, D], seen [T, C] -> [T, H, D], computed in float32."""
    num_tokens, num_heads, head_dim = query.shape
    grouped = query.float().view(num_tokens, key.shape[1], -1, head_dim).permute(1, 2, 0, 3)
    scores = grouped @ key.float().permute(1, 2, 0)[:, None] * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen.to(scores.device), float("-inf")).softmax(dim=-1)
    out = weights @ value.float().transpose(0, 1)[:, None]
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim).to(query.dtype)
