"""Packed linear layers against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.model import bf16_kernels, linear
from flowkv.model.linear import Bf16Linear, OneDnnLinear, packed, packed_gate

needs_bf16 = pytest.mark.skipif(not bf16_kernels.is_supported(), reason="needs AVX512-BF16")
ROUNDED_ONCE = 2.0**-8  # relative


def module(num_inputs: int, num_outputs: int, has_bias: bool, dtype: torch.dtype) -> torch.nn.Linear:
    made = torch.nn.Linear(num_inputs, num_outputs, bias=has_bias).to(dtype)
    return made.requires_grad_(False)


shapes = st.tuples(st.integers(1, 50), st.integers(1, 40).map(lambda k: 2 * k), st.integers(1, 100))


@given(
    shape=shapes, has_bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    own=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
@torch.inference_mode()
def test_they_give_what_torch_gives(
    shape: tuple[int, int, int], has_bias: bool, dtype: torch.dtype, own: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not own:
            patch.setattr(bf16_kernels, "is_supported", lambda: False)
        torch.manual_seed(seed)
        num_rows, num_inputs, num_outputs = shape
        first, second = (module(num_inputs, num_outputs, has_bias, dtype) for _ in range(2))
        x, add = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(num_rows, num_outputs).to(dtype)
        wide = [one.to(torch.float32)(x.float()) for one in (first, second)]
        first, second = first.to(dtype), second.to(dtype)
        expected = {
            "plain": wide[0],
            "add": wide[0] + add.float(),
            "both": torch.cat(wide, dim=1),
            "gated": torch.nn.functional.silu(wide[0]) * wide[1],
        }
        copies = [module(num_inputs, num_outputs, has_bias, dtype) for _ in range(6)]
        for copy, source in zip(copies, [first, first, first, second, first, second], strict=True):
            copy.load_state_dict(source.state_dict())
        found = {
            "plain": packed(copies[0])(x),
            "add": packed(copies[1])(x, add),
            "both": packed(*copies[2:4])(x),
            "gated": packed_gate(*copies[4:6])(x),
        }
    for name, right in expected.items():
        bound = ROUNDED_ONCE if dtype == torch.bfloat16 else 1e-5
        if name == "gated" and not own:
            bound *= 4  # the gate is rounded before it is multiplied with
        assert found[name].dtype == dtype
        assert torch.allclose(found[name].float(), right, rtol=bound, atol=bound), name


@needs_bf16
def test_own_kernels_are_for_bfloat16_and_pairs() -> None:
    assert isinstance(packed(module(4, 4, False, torch.bfloat16)), Bf16Linear)
    assert isinstance(packed(module(5, 4, False, torch.bfloat16)), OneDnnLinear)
    assert isinstance(packed(module(4, 4, False, torch.float32)), OneDnnLinear)


@needs_bf16
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@torch.inference_mode()
def test_what_is_not_a_number_stays_so(bad: float) -> None:
    gate, up = (module(4, 20, False, torch.bfloat16) for _ in range(2))
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    x[1, 2] = bad
    for layer in (packed(module(4, 20, False, torch.bfloat16)), packed_gate(gate, up)):
        out = layer(x)
        assert out[0].isfinite().all() and out[2].isfinite().all()
        assert not out[1].isfinite().any()


def test_modules_give_their_weights_away() -> None:
    given_away = module(4, 4, True, torch.float32)
    packed(given_away)
    assert given_away.weight.numel() == 0


def test_rows_are_interleaved_and_padded() -> None:
    first, second = torch.arange(1, 19)[:, None].float(), torch.arange(101, 119)[:, None].float()
    rows = linear.interleaved(first, second)[:, 0]
    assert rows[:16].tolist() == first[:16, 0].tolist() and rows[16:32].tolist() == second[:16, 0].tolist()
    assert rows[32:35].tolist() == [17, 18, 0] and rows[48:51].tolist() == [117, 118, 0]
