"""The CPU kernel against the plain one, and the plain one against a formula written down per token."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.model.cpu_kernel import CpuKernel
from flowkv.model.kernels import ReferenceKernel
from flowkv.model.packing import PackedBatch, pack

NUM_LAYERS = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Case:
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    spans: list[tuple[int, int]]  # start, tokens
    window: int | None
    softcap: float | None
    dtype: torch.dtype
    scattered: bool
    seed: int

    def batch(self) -> PackedBatch:
        counts = [-(-(start + count) // self.block_size) for start, count in self.spans]
        order = torch.arange(sum(counts))
        if self.scattered:
            order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(self.seed))
        ids = iter(order.tolist())
        tables = [[next(ids) for _ in range(count)] for count in counts]
        return pack([start for start, _ in self.spans], [count for _, count in self.spans], tables, self.block_size)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A pool full of an older request's KV, and query, key, value [T, heads, D] of the batch."""
        generator = torch.Generator().manual_seed(self.seed)
        num_blocks = sum(-(-(start + count) // self.block_size) for start, count in self.spans)
        num_tokens = sum(count for _, count in self.spans)
        shapes = (
            (num_blocks, NUM_LAYERS, 2, self.block_size, self.num_kv_heads, self.head_dim),
            (num_tokens, self.num_kv_heads * self.group, self.head_dim),
            (num_tokens, self.num_kv_heads, self.head_dim),
            (num_tokens, self.num_kv_heads, self.head_dim),
        )
        pool, query, key, value = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
        return pool, query, key, value


cases = st.builds(
    Case,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([4, 16, 20, 32, 64, 72, 128]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    spans=st.lists(st.tuples(st.integers(0, 60), st.sampled_from([1, 1, 1, 2, 7, 20])), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 70),
    softcap=st.none() | st.floats(0.5, 30),
    dtype=st.sampled_from(list(TOLERANCE)),
    scattered=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(cases)
@settings(max_examples=150)
def test_the_cpu_kernel_equals_the_reference(case: Case) -> None:
    batch, (pool, query, key, value) = case.batch(), case.tensors()
    ours, plain = CpuKernel(pool.clone()), ReferenceKernel(pool.clone())
    ours.write_kv(key, value, 1, batch)
    plain.write_kv(key, value, 1, batch)
    assert torch.equal(ours._pool, plain._pool)
    assert torch.equal(ours._pool[:, 0], pool[:, 0])
    found = ours.attend(query, 1, batch, 0.3, case.window, case.softcap)
    expected = plain.attend(query, 1, batch, 0.3, case.window, case.softcap)
    assert found.dtype == expected.dtype == case.dtype
    assert torch.allclose(found.float(), expected.float(), atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])


@given(cases)
@settings(max_examples=30)
def test_the_reference_equals_the_formula_token_by_token(case: Case) -> None:
    batch, (pool, query, key, value) = case.batch(), case.tensors()
    kernel = ReferenceKernel(pool)
    kernel.write_kv(key, value, 0, batch)
    found = kernel.attend(query, 0, batch, 0.3, case.window, case.softcap)
    owner = [item for item, (_, count) in enumerate(case.spans) for _ in range(count)]
    for row, (item, position) in enumerate(zip(owner, batch.positions.tolist(), strict=True)):
        first = 0 if case.window is None else max(0, position - case.window + 1)
        slots = [divmod(place, case.block_size) for place in range(first, position + 1)]
        kv = torch.stack([pool[batch.block_tables[item, block], 0, :, offset] for block, offset in slots]).float()
        for head in range(case.num_kv_heads * case.group):
            scores = kv[:, 0, head // case.group] @ query[row, head].float() * 0.3
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            expected = scores.softmax(0) @ kv[:, 1, head // case.group]
            assert torch.allclose(found[row, head].float(), expected, atol=TOLERANCE[case.dtype], rtol=2e-2)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_what_is_beyond_the_context_is_never_read(dtype: torch.dtype, num_tokens: int) -> None:
    pool = torch.full((4, 1, 2, 4, 2, 16), float("nan"), dtype=dtype)
    batch = pack([0, 2], [2, num_tokens], [[3], [2, 0]], 4)
    kernel = CpuKernel(pool)
    kernel.write_kv(torch.ones(2, 2, 16), torch.ones(2, 2, 16), 0, pack([0], [2], [[2]], 4))
    tokens = torch.ones(2 + num_tokens, 2, 16, dtype=dtype)
    kernel.write_kv(tokens, tokens, 0, batch)
    assert torch.equal(kernel.attend(tokens, 0, batch, 1.0), tokens)


@pytest.mark.parametrize("key_or_value", [0, 1])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_nan_in_the_cache_comes_out_as_nan(key_or_value: int, position: int) -> None:
    pool = torch.zeros(1, 1, 2, 4, 1, 16)
    pool[0, 0, key_or_value, position] = float("nan")
    batch = pack([2], [1], [[0]], 4)
    assert CpuKernel(pool).attend(torch.ones(1, 1, 16), 0, batch, 1.0).isnan().all()


def test_large_scores_do_not_overflow() -> None:
    pool = torch.zeros(2, 1, 2, 4, 1, 16)
    pool[1, 0, 0, 0] = 300.0
    pool[1, 0, 1, 0] = 5.0
    batch = pack([6], [1], [[0, 1]], 4)
    for sign, expected in ((1.0, 5.0), (-1.0, 0.0)):
        out = CpuKernel(pool).attend(torch.full((1, 1, 16), sign * 100), 0, batch, 1.0)
        assert torch.allclose(out, torch.full((1, 1, 16), expected))
