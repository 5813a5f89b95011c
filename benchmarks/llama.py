"""The model that engines are compared on: a Llama of 58.5 M parameters with random weights, made on the spot."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 32_000
NUM_PARAMETERS = 58_466_816  # embedding and head 16,384,000 each, a layer 3,212,288
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2


def config() -> LlamaConfig:
    """Every query head has its own KV head, as in the Llama of 7 B parameters: 16 KiB of KV a token in bfloat16."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=8704,  # 8,192 tokens and a chunk, or some steps, after them
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def make_llama(folder: Path, seed: int = 0) -> None:
    """A model folder with bfloat16 weights and a tokenizer whose every id is a word (`w3` to `w31999`)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config())
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    words = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(len(SPECIAL_TOKENS), VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": config().max_position_embeddings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1) + "\n")
