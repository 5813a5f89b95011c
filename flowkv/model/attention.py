"""Our attention function, which `transformers` calls once a layer, and the forward pass over a packed batch.

Sequences lie one after the other in a single row [1, T], their positions in `position_ids`. Keywords given to the
model reach the attention function unchanged; that is how it gets the batch and the kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel

from flowkv.model.cpu_kernel import CpuKernel
from flowkv.model.kernels import AttentionKernel, ReferenceKernel
from flowkv.model.packing import PackedBatch

ATTENTION_NAME = "flowkv"

# (batch, token ids [T], rows [R]) -> logits [R, vocabulary] of the query tokens named in `rows`; the KV of all T tokens
# goes to the pool.
Forward = Callable[[PackedBatch, torch.Tensor, torch.Tensor], torch.Tensor]


class Model(Protocol):
    """Weights that can be run over a KV pool."""

    def over(self, pool: torch.Tensor) -> Forward:
        """The forward pass over pool [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flowkv_batch: PackedBatch,
    flowkv_kernel: AttentionKernel,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **known: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key, value [1, Hkv, T, D] -> [1, T, H, D].

    What the remaining keywords may be was checked when the model was loaded (`flowkv.model.probe`).
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    flowkv_kernel.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), layer, flowkv_batch)
    rows = query[0].transpose(0, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return flowkv_kernel.attend(rows, layer, flowkv_batch, scale, sliding_window, softcap)[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


def make_kernel(pool: torch.Tensor) -> AttentionKernel:
    """The best kernel there is for the device that holds the pool."""
    return CpuKernel(pool) if pool.device.type == "cpu" else ReferenceKernel(pool)


class PlainModel:
    """The modules of `transformers` as they are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def over(self, pool: torch.Tensor) -> Forward:
        return partial(self._forward, make_kernel(pool))

    def _forward(
        self, kernel: AttentionKernel, batch: PackedBatch, token_ids: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        output = self._model(
            input_ids=token_ids[None],
            position_ids=torch.from_numpy(batch.positions)[None].to(token_ids.device),
            use_cache=False,
            logits_to_keep=rows,
            flowkv_batch=batch,
            flowkv_kernel=kernel,
        )
        logits: torch.Tensor = output.logits[0]
        return logits
