"""What the machine was seen to do at best, and what a model asks of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.engine.instance import Step
from flowkv.model.loading import LoadedModel, read_config

READ_BYTES, READ_TURNS = 2**30, 5
MATRIX_SIZE, MATRIX_TURNS, MATRIX_TURN_S = 2048, 5, 0.03
LARGE_ROWS = 2048


@dataclass(slots=True)
class Machine:
    """What it was seen to do, a figure a round; its best is the roof."""

    bandwidths: list[float] = field(default_factory=list)  # bytes read a second
    matrix_rates: dict[int, list[float]] = field(default_factory=dict)  # operations a second, by rows of the left side

    @property
    def bandwidth(self) -> float:
        return max(self.bandwidths)

    @property
    def matrix_rate(self) -> float:
        return max(max(rates) for rates in self.matrix_rates.values())

    def measure(self, rows: Sequence[int], dtype: torch.dtype) -> None:
        self.bandwidths.append(read_bandwidth(READ_BYTES))
        for num_rows in sorted({*rows, LARGE_ROWS}):
            self.matrix_rates.setdefault(num_rows, []).append(matrix_rate(num_rows, dtype))


def read_bandwidth(num_bytes: int) -> float:
    """Bytes a second at which torch sums a tensor of this size, at best."""
    numbers = torch.ones(num_bytes // 4)
    return num_bytes / min(seconds_of(numbers.sum) for _ in range(READ_TURNS))


def matrix_rate(num_rows: int, dtype: torch.dtype) -> float:
    """Operations a second of [rows, 2048] x [2048, 2048] with weights packed by oneDNN, at best; the weights are
    the same each time, so they may lie in a cache."""
    left = torch.randn(num_rows, MATRIX_SIZE).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype), num_rows)

    def multiply() -> None:
        torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")

    multiply()
    num_calls = max(1, int(MATRIX_TURN_S / seconds_of(multiply)))

    def turn() -> None:
        for _ in range(num_calls):
            multiply()

    best_s = min(seconds_of(turn) for _ in range(MATRIX_TURNS))
    return 2 * num_rows * MATRIX_SIZE**2 * num_calls / best_s


def seconds_of(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


@dataclass(frozen=True, slots=True)
class Model:
    """What a step has to read and to multiply, whatever computes it. For dense models: each token uses all weights."""

    num_body_parameters: int  # without embedding and head
    num_head_parameters: int
    element_bytes: int
    token_bytes: int  # of KV
    pair_flops: int  # of attention: a token and a position that it attends to

    @classmethod
    def of(cls, folder: Path, loaded: LoadedModel) -> "Model":
        config = read_config(folder).get_text_config()
        num_head = config.vocab_size * config.hidden_size
        num_embeddings = 1 if config.tie_word_embeddings else 2
        layout = loaded.layout(1)
        return cls(
            num_body_parameters=num_parameters(folder) - num_embeddings * num_head,
            num_head_parameters=num_head,
            element_bytes=layout.element_bytes,
            token_bytes=layout.token_bytes,
            pair_flops=4 * loaded.num_layers * config.num_attention_heads * loaded.head_dim,
        )

    def kv_bytes(self, step: Step) -> int:
        return step.context_tokens * self.token_bytes

    def read_bytes(self, step: Step) -> int:
        head = self.num_head_parameters if step.num_draws else 0
        return (self.num_body_parameters + head) * self.element_bytes + self.kv_bytes(step)

    def flops(self, step: Step) -> int:
        linear = self.num_body_parameters * step.num_tokens + self.num_head_parameters * step.num_draws
        return 2 * linear + self.pair_flops * step.num_pairs


def num_parameters(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    return total
