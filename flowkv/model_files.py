"""What the tokenizer and the small JSON files of a Hugging Face model folder say, without `transformers`."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flowkv.errors import ModelError


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises `ModelError` where the folder holds no readable `tokenizer.json`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json. Make one from the model's own tokenizer with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every file that it cannot read
        raise ModelError(f"{path} cannot be read: {error}") from error
    # Some files carry settings of the training run, which would cut or fill up prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def eos_token_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """All that end a sequence, by any of the folder's files."""
    eos_ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name)
        for part in (config, config.get("text_config") or {}):
            eos_ids.update(_as_ids(part.get("eos_token_id")))
    token = special_tokens(read_json(folder / "tokenizer_config.json")).get("eos_token")
    if token is not None and (token_id := tokenizer.token_to_id(token)) is not None:
        eos_ids.add(token_id)
    return frozenset(eos_ids)


def special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on: each is a string, or a dictionary with its text under "content"."""
    found = {name: value for name, value in tokenizer_config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises `ModelError` where it holds something else than an object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else value
