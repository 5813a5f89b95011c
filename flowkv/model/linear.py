"""Linear layers with weights packed for the machine: for our own kernels (bfloat16 with AVX512-BF16), else for oneDNN.

The modules that they are made of lose their weights, so that these are not held twice.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flowkv.model import bf16_kernels
from flowkv.model.bf16_kernels import COLUMNS
from flowkv.model.cpu_kernel import storage_view
from flowkv.model.numba_kernels import LANES

PACKED_FOR_TOKENS = 16  # what oneDNN is told of the number of rows; it serves any

Weights = tuple[torch.Tensor, torch.Tensor | None]  # weight [outputs, inputs] and bias [outputs]
# (x [T, inputs], what to add to the result [T, outputs] or None) -> [T, outputs]
Linear = Callable[..., torch.Tensor]
# x [T, inputs] -> silu(gate) * up, [T, outputs]
Gated = Callable[[torch.Tensor], torch.Tensor]


def packed(*parts: Any) -> Linear:
    """Linear modules of the same input as one, their outputs side by side."""
    kind = Bf16Linear if uses_own_kernels(parts[0].weight) else OneDnnLinear
    return kind(*take_weights(parts))


def packed_gate(gate: Any, up: Any) -> Gated:
    """The first half of a gated MLP."""
    if uses_own_kernels(gate.weight):
        num_outputs = len(gate.weight)
        return Bf16Gated(num_outputs, *take_gate(gate, up))
    return OneDnnGated(OneDnnLinear(*take_weights([gate])), OneDnnLinear(*take_weights([up])))


def uses_own_kernels(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0 and bf16_kernels.is_supported()


def take_weights(parts: Any) -> Weights:
    """Of all parts, side by side."""
    weight = torch.cat([part.weight.detach() for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
    for part in parts:
        part.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    return weight, bias


def take_gate(gate: Any, up: Any) -> Weights:
    """Of both, `interleaved`."""
    (gate_weight, gate_bias), (up_weight, up_bias) = take_weights([gate]), take_weights([up])
    bias = None if gate_bias is None or up_bias is None else interleaved(gate_bias, up_bias)
    return interleaved(gate_weight, up_weight), bias


class OneDnnLinear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_TOKENS)
        self._bias = bias

    def __call__(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        return self.activated(x, "none") if add is None else self.combined(x, "add", add)

    def activated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, activation, [], "")
        return out

    def combined(self, x: torch.Tensor, operation: str, other: torch.Tensor) -> torch.Tensor:
        """ "add"ed to `other` or "mul"tiplied with it."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, operation)
        return out


class OneDnnGated:
    def __init__(self, gate: OneDnnLinear, up: OneDnnLinear) -> None:
        self._gate, self._up = gate, up

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._up.combined(x, "mul", self._gate.activated(x, "swish"))


class Bf16Linear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._num_outputs = len(weight)
        self._panels = storage_view(panels_of(weight))
        self._bias = padded_bias(bias, len(self._panels))

    def __call__(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty((len(x), self._num_outputs), dtype=x.dtype)
        other = None if add is None else storage_view(add)
        bf16_kernels.linear(storage_view(x), self._panels, self._bias, other, storage_view(out))
        return out


class Bf16Gated:
    """`weight` and `bias` as `take_gate` gives them."""

    def __init__(self, num_outputs: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._num_outputs = num_outputs
        self._panels = storage_view(panels_of(weight))
        self._bias = padded_bias(bias, len(self._panels))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((len(x), self._num_outputs), dtype=x.dtype)
        bf16_kernels.gated_linear(storage_view(x), self._panels, self._bias, storage_view(out))
        return out


def padded_bias(bias: torch.Tensor | None, num_panels: int) -> Any:
    """float32, zeros where there is none."""
    out = np.zeros(num_panels * COLUMNS, np.float32)
    if bias is not None:
        out[: len(bias)] = bias.float().numpy()
    return out


def interleaved(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`LANES` rows of one, as many of the other, and so on; both padded with zeros to whole such groups."""
    both = [grouped(part, LANES) for part in (first, second)]
    return torch.stack(both, dim=1).flatten(0, 2)


def panels_of(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [N / COLUMNS, K / 2, COLUMNS, 2]."""
    groups = grouped(weight, COLUMNS)
    return groups.view(*groups.shape[:2], -1, 2).transpose(1, 2).contiguous()


def grouped(rows: torch.Tensor, size: int) -> torch.Tensor:
    """[N, ...] -> [N / size, size, ...], padded with zeros."""
    num_groups = -(-len(rows) // size)
    out = rows.new_zeros((num_groups * size, *rows.shape[1:]))
    out[: len(rows)] = rows
    return out.view(num_groups, size, *rows.shape[1:])
