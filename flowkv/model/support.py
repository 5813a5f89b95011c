"""What a model's configuration and class say against serving it. `flowkv.model.probe` then watches the model itself."""

from pathlib import Path
from typing import Any, cast

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from flowkv.errors import ModelError

KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def refuse(name: str, reason: str) -> ModelError:
    return ModelError(f"FlowKV cannot serve {name}: {reason}.")


def model_class(config: PretrainedConfig, code_folder: Path | None = None) -> type[PreTrainedModel]:
    """The causal language model class of a configuration. ModelError, with the reason, if FlowKV cannot serve it.

    `code_folder` is a model's own folder, where its code is trusted.
    """
    name = str(config.model_type)
    reason = reason_in_config(config) or reason_in_config(config.get_text_config())
    if reason is not None:
        raise refuse(name, reason)
    found = _class(config, code_folder)
    if found is None:
        raise refuse(name, "transformers has no causal language model of this architecture")
    reason = reason_in_class(found)
    if reason is not None:
        raise refuse(name, reason)
    return found


def _class(config: PretrainedConfig, code_folder: Path | None) -> type[PreTrainedModel] | None:
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own is not None and code_folder is not None:
        try:
            found: Any = get_class_from_dynamic_module(own, code_folder, local_files_only=True)
        except (OSError, ImportError, AttributeError, SyntaxError) as error:
            raise refuse(str(config.model_type), f"its code {own} cannot be run: {error}") from error
        return cast(type[PreTrainedModel], found)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def reason_in_config(config: PretrainedConfig) -> str | None:
    """Why a configuration cannot be served, None if nothing in it says so."""

    def value(field: str) -> Any:
        return getattr(config, field, None)

    unknown_layers = sorted(set(value("layer_types") or ()) - KNOWN_LAYER_TYPES)
    checks = (
        (value("is_encoder_decoder"), "it is an encoder-decoder; only decoder-only models are served"),
        (value("kv_lora_rank"), "it uses latent attention, whose cache is not keys and values by head"),
        (value("num_kv_shared_layers"), "some of its layers share one KV cache"),
        (value("alibi"), "it adds position biases (ALiBi) to its attention scores"),
        (value("use_bidirectional_attention"), "its attention is bidirectional"),
        (value("quantization_config"), "its weights are quantized; give a folder with float32, bfloat16 or float16"),
        (unknown_layers, f"it has layers of a kind other than full or sliding attention: {', '.join(unknown_layers)}"),
    )
    return next((reason for found, reason in checks if found), None)


def reason_in_class(found: type[PreTrainedModel]) -> str | None:
    if found._is_stateful:
        return "it keeps a recurrent state (state-space or hybrid layers), not only keys and values"
    if not found._can_set_attn_implementation():
        return "its attention does not go through the attention interface of transformers"
    return None


def max_model_tokens(config: PretrainedConfig) -> int:
    """The longest sequence, in tokens. ModelError if the configuration does not say."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise refuse(str(config.model_type), "its config.json does not say how many positions it has")
    return min([longest, *longrope_bounds(text)])


def longrope_bounds(config: PretrainedConfig) -> list[int]:
    """Where `longrope` would change every position's rotation, those already in the cache included."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, dict)]
    return [
        int(part["original_max_position_embeddings"])
        for part in (by_layer_type or [rope])
        if part.get("rope_type") == "longrope"
    ]
