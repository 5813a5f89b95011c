"""Tiny models with random weights, made on the spot and saved as a user's model folder would be."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from flowkv.model import loading, support

VOCAB_SIZE = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # so that attention weights are far from uniform and logits far from ties
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=7, attn_logit_softcapping=2.0),
    "phi3": Phi3Config(**SHAPE),
}


def save_model(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():  # biases start as zeros and norms as ones: they could be left out unnoticed
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def eager_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights with the model's own attention: what is right."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    model: PreTrainedModel = loaded.train(False)
    return model


def modules(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """The model as `load_model` has it before it decides what runs it."""
    config = loading.read_config(folder)
    model_class = support.model_class(config)
    return loading.load_weights(folder, model_class, config, dtype, lambda fraction, text: None)
