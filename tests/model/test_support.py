"""What cannot be served is refused with a sentence, and refused for the right reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    MambaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)

from flowkv.errors import ModelError
from flowkv.model import attention, probe, support
from flowkv.model.attention import ATTENTION_NAME, Model, PlainModel
from flowkv.model.kernels import ReferenceKernel
from flowkv.model.loading import load_model
from flowkv.model.probe import Recorder
from tests.model.tiny_models import CONFIGS, SHAPE, modules, save_model

REFUSED: list[tuple[PretrainedConfig, str]] = [
    (T5Config(), "encoder-decoder"),
    (MambaConfig(), "linear_attention"),
    (FalconH1Config(), "hybrid"),
    (JambaConfig(), "mamba|linear_attention|recurrent"),
    (DeepseekV3Config(), "latent attention"),
    (Llama4TextConfig(), "chunked_attention"),
    (BloomConfig(), "attention interface"),
    (FalconConfig(alibi=True), "ALiBi"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=lambda value: getattr(value, "model_type", ""))
def test_an_architecture_is_refused_with_the_reason(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"^FlowKV cannot serve {config.model_type}: .*({reason}).*\.$"):
        support.model_class(config)


def test_a_refusal_comes_before_the_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    DeepseekV3Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="latent attention"):
        load_model(tmp_path, "auto")


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    layers: dict[str, Any] = {"layer_types": ["full_attention", "full_attention"]}
    folder = save_model(GptOssConfig(**SHAPE, **layers, head_dim=16, num_local_experts=2), tmp_path)
    with pytest.raises(ModelError, match="attention sinks"):
        load_model(folder, "auto")


def test_chunked_masks_are_seen_even_if_the_config_hides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "KNOWN_LAYER_TYPES", {"full_attention", "chunked_attention"})
    config = Llama4TextConfig(
        **SHAPE,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=128,
        intermediate_size_mlp=64,
        layer_types=["chunked_attention", "full_attention"],
    )
    with pytest.raises(ModelError, match="not plainly causal"):
        load_model(save_model(config, tmp_path), "auto")


def recorder() -> Recorder:
    return Recorder("tiny", max_tokens=256)


@pytest.mark.parametrize(("keyword", "value", "reason"), [
    ("s_aux", torch.zeros(4), "sinks"),
    ("position_bias", torch.zeros(4), "bias"),
    ("surprise", False, "does not know"),
    ("is_causal", False, "not causal"),
])  # fmt: skip
def test_keywords_that_ours_would_ignore_are_refused(keyword: str, value: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        recorder().check_keywords(torch.nn.Identity(), {keyword: value})


def test_keywords_without_effect_pass() -> None:
    recorder().check_keywords(
        torch.nn.Identity(), {"surprise": None, "scaling": 2.0, "is_causal": True, "use_cache": False}
    )


def masked(allows: Any) -> torch.Tensor:
    return probe.recording_mask(q_length=6, kv_length=6, mask_function=allows)


@pytest.mark.parametrize("window", [None, 1, 5, 128])
def test_masks_must_say_what_the_window_keyword_says(window: int | None) -> None:
    meant = masked(lambda batch, head, q, k: (k <= q) & (k > q - (window or 1000)))
    recorder().check_mask(meant, window)
    for other in {None, 1, 5, 128, 4, 6, 129} - {window}:
        with pytest.raises(ModelError, match="not plainly causal"):
            recorder().check_mask(meant, other)


def test_prefix_masks_and_home_made_masks_are_refused() -> None:
    with pytest.raises(ModelError, match="not plainly causal"):
        recorder().check_mask(masked(lambda batch, head, q, k: (k <= q) | (k < 4)), None)
    with pytest.raises(ModelError, match="depends on the tokens"):
        recorder().check_mask(masked(lambda batch, head, q, k: (k <= q) & (torch.ones(6)[k] == 1)), None)
    for mask in (None, torch.ones(1, 1, 6, 6)):
        with pytest.raises(ModelError, match="masks itself"):
            recorder().check_mask(mask, None)


def test_heads_and_layers_that_do_not_fit_are_refused() -> None:
    layer, mask = torch.nn.Identity(), masked(lambda batch, head, q, k: k <= q)
    layer.layer_idx = 0  # type: ignore[assignment]
    query, key = torch.zeros(1, 4, 6, 16), torch.zeros(1, 2, 6, 16)
    with pytest.raises(ModelError, match="different sizes"):
        recorder().record(layer, query, key, torch.zeros(1, 2, 6, 8), mask, {})
    twice = recorder()
    twice.record(layer, query, key, key, mask, {})
    with pytest.raises(ModelError, match="more than once"):
        twice.record(layer, query, key, key, mask, {})


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return modules(save_model(CONFIGS["mistral"], tmp_path), "float32")


def test_layers_that_stay_away_from_the_interface_are_noticed(model: Any) -> None:
    model.config.num_hidden_layers = 1
    model.model.layers[0].self_attn.layer_idx = 1
    with pytest.raises(ModelError, match="go through the attention interface"):
        probe.watch(model, 256)


def compare(model: PreTrainedModel, ours: Model) -> None:
    _, geometry = probe.watch(model, 256)
    probe.compare(ours, probe.expected_logits(model), 2, geometry, model.dtype, "mistral")


class WindowlessKernel(ReferenceKernel):
    def attend(self, *args: Any) -> torch.Tensor:
        query, layer, batch, scale, _, softcap = args
        return super().attend(query, layer, batch, scale, None, softcap)


def test_wrong_numbers_are_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(model, PlainModel(model))
    monkeypatch.setattr(attention, "make_kernel", WindowlessKernel)
    with pytest.raises(ModelError, match="logits differ"):
        compare(model, PlainModel(model))
    assert model.config._attn_implementation == ATTENTION_NAME


def test_state_carried_from_token_to_token_is_noticed(model: Any) -> None:
    """A layer that mixes each token with the one before it is right over whole prompts and wrong one at a time."""

    def shifted(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + output.roll(1, dims=1) * (torch.arange(output.shape[1]) > 0)[:, None]

    model.model.layers[0].mlp.register_forward_hook(shifted)
    with pytest.raises(ModelError, match="logits differ"):
        compare(model, PlainModel(model))


def test_longrope_stops_where_it_would_turn_what_is_cached() -> None:
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_type": "longrope", "rope_theta": 10000.0}
    config = Phi3Config(
        **SHAPE,
        rope_parameters={**factors, "original_max_position_embeddings": 64},
        original_max_position_embeddings=64,
    )
    assert support.max_model_tokens(config) == 64
    assert support.max_model_tokens(CONFIGS["phi3"]) == 256
