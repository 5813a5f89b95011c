"""Writes the model as llama.cpp reads it; runs in the peer's environment, which has `gguf`, and needs no torch.

    PYTHON benchmarks/peers/gguf_file.py MODEL_FOLDER OUTPUT.gguf

Matrices stay in bfloat16, norms become float32, which is all that llama.cpp takes. It rotates pairs of neighbours where
`transformers` rotates halves, so the rows of the query and key projections change places.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """Of a tensor, from its name in `transformers`; KeyError for one that a Llama has not."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor of a safetensors file of bfloat16, as the uint16 of its bits."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} is {entry['dtype']}, not BF16")
            low, high = entry["data_offsets"]
            yield name, np.frombuffer(data[start + low : start + high], np.uint16).reshape(entry["shape"])


def neighbours(rows: Array, num_heads: int) -> Array:
    """[heads * size, hidden]: rows i and i + size/2 of each head become neighbours."""
    return rows.reshape(num_heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def converted(weights: Path, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """Names and tensors as the file has them: matrices as bytes of bfloat16, norms in float32."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, bits in tensors(weights):
        part = name.split(".")[-2]
        if bits.ndim == 1:
            yield gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32)
        else:
            rows = neighbours(bits, heads[part]) if part in heads else bits
            yield gguf_name(name), np.ascontiguousarray(rows).view(np.uint8)


def _add_settings(gguf: Any, writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_tokens(gguf: Any, writer: Any, folder: Path) -> None:
    """The words of the tokenizer, in the order of their ids, as pieces of a SentencePiece vocabulary."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([kinds.get(word, gguf.TokenType.NORMAL) for word in words])
    writer.add_bos_token_id(model["vocab"]["<s>"])
    writer.add_eos_token_id(model["vocab"]["</s>"])
    writer.add_unk_token_id(model["vocab"]["<unk>"])


def main(folder: Path, output: Path) -> None:
    gguf = importlib.import_module("gguf")  # without types, and not a package of FlowKV
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(output, "llama")
    _add_settings(gguf, writer, config)
    _add_tokens(gguf, writer, folder)
    for name, tensor in converted(folder / "model.safetensors", config):
        writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.BF16 if tensor.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
