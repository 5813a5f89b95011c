"""Cost models: what they say of a step, where they come from, and what is no cost model."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.errors import ConfigError
from flowkv.sim.costs import (
    PROFILE_FORMAT,
    AnalyticCost,
    CostModel,
    Curve,
    Fit,
    FittedCost,
    LinkSpeeds,
    Profile,
    StepShape,
    cost_model,
    list_cost_models,
    read_profile,
)
from flowkv.sim.hardware import ACCELERATORS, MODELS

FIT = Fit(
    step_s=1.7e-3,
    prefill=Curve([0, 16, 64, 65], [0.0, 1e-3, 3e-3, 3.05e-3]),
    pair_s=5.3e-8,
    decode=Curve([0, 4, 5], [0.0, 3e-4, 3.7e-4]),
    slot_s=2.9e-7,
    row_s=2e-5,
)
PROFILE = Profile(
    format=PROFILE_FORMAT, model="tiny", dtype="float32", hardware="two cores", max_model_tokens=2048, vocab_size=1536,
    token_bytes=2048, kv_bytes=2**26, noise_fraction=0.03, fit=FIT,
    links=LinkSpeeds(link_bytes_per_s=1e10, call_s=5e-6, message_s=6e-5),
)  # fmt: skip
NAMES = [summary.name for summary in list_cost_models()]


def every_model() -> list[CostModel]:
    return [*map(cost_model, NAMES), FittedCost(PROFILE, "tiny.json")]


@pytest.mark.parametrize("model", every_model(), ids=lambda model: model.name)
@given(choices=st.integers(1, 300), context=st.integers(0, 10**6), num_steps=st.integers(1, 40))
def test_repeated_steps_are_single_steps_to_the_last_bit(
    model: CostModel, choices: int, context: int, num_steps: int
) -> None:
    repeated = model.repeated_s(choices, context, num_steps)
    single = [
        model.step_s(StepShape(0, 0, choices, context + i * choices, choices)) for i in range(num_steps)
    ]  # fmt: skip
    assert repeated.dtype == np.float64
    assert repeated.tolist() == single


@pytest.mark.parametrize("model", every_model(), ids=lambda model: model.name)
@given(
    shape=st.builds(
        StepShape, st.integers(0, 4096), st.integers(0, 10**7), st.integers(0, 256), st.integers(0, 10**6),
        st.integers(0, 256),
    ),
    more=st.integers(1, 100),
    field=st.sampled_from(["prefill_pairs", "decode_choices", "decode_context_tokens", "num_drawn"]),
)  # fmt: skip
def test_more_work_never_takes_less_time(model: CostModel, shape: StepShape, more: int, field: str) -> None:
    larger = shape._replace(**{field: getattr(shape, field) + more})
    assert 0 < model.step_s(shape) <= model.step_s(larger)


def test_one_decode_on_an_h100_reads_the_weights_once() -> None:
    model = cost_model("llama-3.1-8b/h100")
    weights_bytes = 2 * (8.03e9 - 0.525e9)  # all but the embedding, of which a row is read
    assert model.step_s(StepShape(0, 0, 1, 1, 1)) == pytest.approx(1e-3 + weights_bytes / (0.8 * 3.35e12), rel=0.01)


def test_a_long_chunk_is_bound_by_arithmetic() -> None:
    model = cost_model("llama-3.1-8b/h100")
    tokens = 8192
    linear_s = 2 * (8.03e9 - 2 * 0.525e9) * tokens / (0.6 * 989.4e12)
    attention_s = 4 * 32 * 4096 * (tokens * (tokens + 1) / 2) / (0.5 * 989.4e12)
    expected_s = 1e-3 + linear_s + attention_s + 0.39e-3  # and the output matrix for one row
    assert model.step_s(StepShape(tokens, tokens * (tokens + 1) // 2, 0, 0, 1)) == pytest.approx(expected_s, rel=0.01)


def test_parameters_are_those_published() -> None:
    assert [round(model.num_parameters / 1e9, 2) for model in MODELS] == [8.03, 70.55]


def test_memory_left_for_kv() -> None:
    model = cost_model("llama-3.1-8b/h100")
    assert model.block_bytes(16) == 16 * 131072
    assert model.num_blocks(16) * model.block_bytes(16) == pytest.approx(0.9 * 80e9 - 16.06e9, rel=0.001)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"llama-3.1-70b/a100: the weights do not fit into 72 GB"):
        AnalyticCost(MODELS[1], ACCELERATORS[0], 1)


def test_tensor_parallelism_pays_for_its_all_reduces() -> None:
    four, eight = (AnalyticCost(MODELS[1], ACCELERATORS[1], num) for num in (4, 8))
    shape = StepShape(512, 512 * 513 // 2, 0, 0, 1)
    assert 1.0 < four.step_s(shape) / eight.step_s(shape) < 2.0


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_model_says_where_its_figures_come_from(name: str) -> None:
    model = cost_model(name)
    assert (model.name, f"{model.model}/{model.hardware}") == (name, name)
    source = next(summary.source for summary in list_cost_models() if summary.name == name)
    assert "NVIDIA" in source
    assert "Llama" in source


def test_curve_is_straight_between_and_beyond_its_counts() -> None:
    assert [FIT.prefill.at(n) for n in (0, 8, 16, 40, 64, 164)] == pytest.approx([0, 5e-4, 1e-3, 2e-3, 3e-3, 8e-3])


def test_a_fit_adds_up() -> None:
    model = FittedCost(PROFILE, "tiny.json")
    expected_s = 1.7e-3 + 1e-3 + 136 * 5.3e-8 + 3e-4 + 1000 * 2.9e-7 + 5 * 2e-5
    assert model.step_s(StepShape(16, 136, 4, 1000, 5)) == pytest.approx(expected_s)


def test_a_profile_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode({**msgspec.to_builtins(PROFILE), "measured": {"anything": 1}}))
    model = cost_model(str(path), model="tiny", dtype="float32")
    assert isinstance(model, FittedCost)
    assert model.profile == PROFILE
    assert (model.num_blocks(16), model.max_model_tokens, model.vocab_size) == (2048, 2048, 1536)
    assert read_profile(path).overrides == {
        "simulate.noise_fraction": 0.03, "simulate.link_bytes_per_s": 1e10, "simulate.call_s": 5e-6,
        "simulate.message_s": 6e-5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "dtype", "message"),
    [("large", None, "a profile of model tiny, not large"), (None, "bfloat16", "dtype float32, not bfloat16")],
)
def test_a_profile_of_something_else_is_refused(
    tmp_path: Path, model: str | None, dtype: str | None, message: str
) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(PROFILE))
    with pytest.raises(ConfigError, match=message) as caught:
        cost_model(str(path), model, dtype)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a profile"),
        (b"\xff\xfe", "not a profile"),
        (b"[]", "not a profile"),
        (b'{"format": "flowkv-profile-1"}', "missing required field"),
        (msgspec.json.encode(PROFILE).replace(b"profile-1", b"profile-0"), "format 'flowkv-profile-0'"),
        (msgspec.json.encode(PROFILE).replace(b'"step_s":0.0017', b'"step_s":-1'), "not negative"),
        (msgspec.json.encode(PROFILE).replace(b"[0,16,64,65]", b"[0,16,64,64]"), "rise from 0"),
        (msgspec.json.encode(PROFILE).replace(b"[0,16,64,65]", b"[0,16]"), "as many counts as seconds"),
        (msgspec.json.encode(PROFILE).replace(b'"kv_bytes":67108864', b'"kv_bytes":0'), "positive"),
    ],
)
def test_what_is_no_profile_gives_one_line_with_the_file(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        cost_model(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(
        ConfigError, match=r"no cost model llama-3.1-8b/b200: .* llama-3.1-8b/h100, .*llama-3.1-70b/l20x8"
    ):
        cost_model("llama-3.1-8b/b200")


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        cost_model(str(tmp_path))
