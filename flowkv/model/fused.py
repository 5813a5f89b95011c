"""The forward pass of the Llama family for CPUs, in fewer and faster steps than the modules of `transformers` take it.

Projections of the same input are one matrix, weights lie in the order in which products read them, activations and
residual sums are made where the product is, and norms, rotary positions and the write into the KV pool are one loop
each (docs/decisions/0014). The numbers are those of the modules but for rounding; models that this does not fit keep
theirs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from flowkv.model.attention import Forward
from flowkv.model.cpu_kernel import CpuKernel, Rotation, storage_view
from flowkv.model.linear import (
    Gated,
    Linear,
    Weights,
    packed,
    packed_gate,
    padded_bias,
    panels_of,
    take_gate,
    take_weights,
    uses_own_kernels,
)
from flowkv.model.numba_kernels import rms_norm
from flowkv.model.packing import PackedBatch
from flowkv.model.stack_kernels import run_layers

# Classes of `transformers`, by name: importing each takes a while, and one is needed.
FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
DTYPES = (torch.float32, torch.bfloat16)
ROTATIONS = ("default", "linear", "llama3", "yarn", "longrope")  # an angle depends on the position alone
FIRST_POSITIONS = 4096  # of the table of angles; it doubles as sequences grow

Float32Array = NDArray[np.float32]
AngleTable = tuple[Float32Array, Float32Array]  # cos and sin [P, D / 2]


def fits(model: PreTrainedModel) -> bool:
    """Whether `FusedModel` computes what this model does."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        type(model).__name__ in FAMILIES
        and type(model).__module__.startswith("transformers.models.")
        and model.dtype in DTYPES
        and model.device.type == "cpu"
        and config.hidden_act == "silu"
        and rope.get("rope_type") in ROTATIONS
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and head_dim % 2 == 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (model.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class FusedModel:
    """Takes the weights out of the modules: `model` cannot compute any more, its config and embeddings stay."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.model
        self._embedding = decoder.embed_tokens.weight
        self._layers = Stack(decoder.layers) if can_stack(decoder.layers) else Layers(decoder.layers)
        self._norm = Norm.of(decoder.norm)
        self._head = packed(model.lm_head)
        self._angles = Angles(decoder.rotary_emb, model.dtype)

    def over(self, pool: torch.Tensor) -> Forward:
        return partial(self._forward, CpuKernel(pool))

    def _forward(
        self, kernel: CpuKernel, batch: PackedBatch, token_ids: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        hidden = torch.nn.functional.embedding(token_ids, self._embedding)
        angles = self._angles.up_to(int(batch.context_tokens.max(initial=0)))
        hidden = self._layers(hidden, kernel, batch, angles)
        if len(rows) != len(hidden):
            hidden = hidden[rows]
        return self._head(self._norm(hidden))


class Norm(NamedTuple):
    """Root mean square over the last axis; `weight` is widened once, for the loops."""

    weight: Float32Array
    eps: np.float32

    @classmethod
    def of(cls, module: Any) -> "Norm":
        return cls(module.weight.detach().float().numpy(), np.float32(module.variance_epsilon))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(hidden)
        rms_norm(storage_view(hidden), self.weight, self.eps, storage_view(out))
        return out


NO_NORM = Norm(np.empty(0, np.float32), np.float32(0.0))


def head_norms_of(attention: Any) -> tuple[Norm, Norm]:
    """Of queries and keys."""
    return (
        (Norm.of(attention.q_norm), Norm.of(attention.k_norm)) if hasattr(attention, "q_norm") else (NO_NORM, NO_NORM)
    )


def window_of(attention: Any) -> int | None:
    """Mistral's modules read it from the config, Qwen's have it for the layers that use it; Llama has none."""
    config = attention.config
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return None if window is None else int(window)


class Layer(NamedTuple):
    number: int
    num_heads: int
    scale: float
    window: int | None
    before_attention: Norm
    query_norm: Norm
    key_norm: Norm
    qkv: Linear
    attention_out: Linear
    before_mlp: Norm
    gated: Gated
    down: Linear

    @classmethod
    def of(cls, module: Any, number: int) -> "Layer":
        attention, mlp, config = module.self_attn, module.mlp, module.self_attn.config
        query_norm, key_norm = head_norms_of(attention)
        return cls(
            number=number,
            num_heads=config.num_attention_heads,
            scale=attention.scaling,
            window=window_of(attention),
            before_attention=Norm.of(module.input_layernorm),
            query_norm=query_norm,
            key_norm=key_norm,
            qkv=packed(attention.q_proj, attention.k_proj, attention.v_proj),
            attention_out=packed(attention.o_proj),
            before_mlp=Norm.of(module.post_attention_layernorm),
            gated=packed_gate(mlp.gate_proj, mlp.up_proj),
            down=packed(mlp.down_proj),
        )

    def __call__(self, hidden: torch.Tensor, kernel: CpuKernel, batch: PackedBatch, angles: AngleTable) -> torch.Tensor:
        """hidden [T, hidden size] -> the same shape."""
        rotation = Rotation(*angles, self.query_norm.weight, self.key_norm.weight, self.query_norm.eps)
        qkv = self.qkv(self.before_attention(hidden))
        query = kernel.rotate_and_write(qkv, self.num_heads, self.number, batch, rotation)
        seen = kernel.attend(query, self.number, batch, self.scale, self.window).flatten(1)
        hidden = self.attention_out(seen, hidden)
        return self.down(self.gated(self.before_mlp(hidden)), hidden)


class Layers:
    """One after the other."""

    def __init__(self, modules: Any) -> None:
        self._layers = [Layer.of(module, number) for number, module in enumerate(modules)]

    def __call__(self, hidden: torch.Tensor, kernel: CpuKernel, batch: PackedBatch, angles: AngleTable) -> torch.Tensor:
        for layer in self._layers:
            hidden = layer(hidden, kernel, batch, angles)
        return hidden


def can_stack(modules: Any) -> bool:
    """Whether `Stack` is for these layers."""
    return all(uses_own_kernels(weight) for weight in modules.parameters() if weight.dim() == 2)


class Stack:
    """All layers in one call, without the interpreter between them."""

    def __init__(self, modules: Any) -> None:
        config = modules[0].self_attn.config
        norms = [[Norm.of(module.input_layernorm), Norm.of(module.post_attention_layernorm)] for module in modules]
        head_norms = [head_norms_of(module.self_attn) for module in modules]
        self._num_heads, self._num_inner = config.num_attention_heads, len(modules[0].mlp.up_proj.weight)
        self._scale = np.float32(modules[0].self_attn.scaling)
        self._windows = np.array([window_of(module.self_attn) or 0 for module in modules])
        self._norms = np.stack([[norm.weight for norm in pair] for pair in norms]), norms[0][0].eps
        self._head_norms = np.stack([[norm.weight for norm in pair] for pair in head_norms])
        self._weights = (
            *stacked(modules, lambda m: take_weights([m.self_attn.q_proj, m.self_attn.k_proj, m.self_attn.v_proj])),
            *stacked(modules, lambda m: take_weights([m.self_attn.o_proj])),
            *stacked(modules, lambda m: take_gate(m.mlp.gate_proj, m.mlp.up_proj)),
            *stacked(modules, lambda m: take_weights([m.mlp.down_proj])),
        )

    def __call__(self, hidden: torch.Tensor, kernel: CpuKernel, batch: PackedBatch, angles: AngleTable) -> torch.Tensor:
        run_layers(
            storage_view(hidden), *self._norms, self._head_norms, *self._weights, self._windows, self._scale,
            self._num_heads, self._num_inner, *angles, kernel.bits, batch.positions, batch.slot_blocks,
            batch.slot_offsets, batch.query_starts, batch.context_tokens, batch.block_tables, batch.decode_items,
            batch.decode_rows, np.asarray(batch.chunk_items, np.int32),
        )  # fmt: skip
        return hidden


def stacked(modules: Any, take: Callable[[Any], Weights]) -> tuple[Any, Float32Array]:
    """Panels and biases of all layers, [L, ...]; one layer at a time, which then loses its own."""
    panels, biases = None, []
    for number, module in enumerate(modules):
        weight, bias = take(module)
        packed_weight = panels_of(weight)
        if panels is None:
            panels = packed_weight.new_empty((len(modules), *packed_weight.shape))
        panels[number] = packed_weight
        biases.append(padded_bias(bias, len(packed_weight)))
    assert panels is not None
    return storage_view(panels), np.stack(biases)


class Angles:
    """cos and sin of the rotary positions, as far as they were needed, rounded like the model's own."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._like = torch.empty(0, dtype=dtype)
        self._table = self._compute(FIRST_POSITIONS)

    def up_to(self, num_positions: int) -> tuple[Float32Array, Float32Array]:
        """[P, D / 2] each, P at least `num_positions`."""
        size = len(self._table[0])
        if num_positions > size:
            while size < num_positions:
                size *= 2
            self._table = self._compute(size)
        return self._table

    def _compute(self, num_positions: int) -> tuple[Float32Array, Float32Array]:
        cos, sin = self._module(self._like, torch.arange(num_positions)[None])
        half = cos.shape[-1] // 2  # the second half repeats the first
        return cos[0, :, :half].float().numpy().copy(), sin[0, :, :half].float().numpy().copy()
