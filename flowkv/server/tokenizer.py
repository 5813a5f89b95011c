"""Text to token ids and back, from the files of a Hugging Face model folder, without `transformers`."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as HfTokenizer

from flowkv.errors import ModelError, RequestError
from flowkv.server.chat_template import ChatTemplate
from flowkv.server.detokenizer import Detokenizer, WindowDetokenizer
from flowkv.server.token_bytes import token_bytes

SENTENCEPIECE_SPACE = "\u2581"


class Tokenizer(Protocol):
    """`eos_token_ids` end a choice unless the client asks to ignore them."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A plain prompt, with the special tokens that the model expects around it unless they are not wanted."""
        ...

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation up to where the assistant begins. Raises `RequestError` if the template refuses it."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """All of the text, special tokens included."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token as it would read in the middle of a text."""
        ...

    def token_piece(self, token_id: int) -> str:
        """The token's entry in the vocabulary; empty for an id that has none."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What it adds to the text in UTF-8; maybe a part of a character."""
        ...

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer: ...


class ModelTokenizer:
    """`tokenizer.json` by the `tokenizers` library, and the chat template beside it."""

    def __init__(self, folder: Path) -> None:
        """Raises `ModelError` where the folder holds no readable tokenizer."""
        self._tokenizer = _load_tokenizer(folder)
        config = _read_json(folder / "tokenizer_config.json")
        self._template = _load_template(folder, config)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_ids = self._find_eos_ids(folder, config)
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if self._template is None:
            raise RequestError("this model has no chat template: use /v1/completions", code="no_chat_template")
        # The template writes the special tokens itself.
        return self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def detokenizer(self, *, skip_special_tokens: bool) -> WindowDetokenizer:
        return WindowDetokenizer(self.decode, self._special_ids if skip_special_tokens else frozenset())

    def token_piece(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        return token_bytes(self.token_text(token_id), self._tokenizer.id_to_token(token_id))

    def _token_text(self, token_id: int) -> str:
        text = self.decode([token_id])
        token = self._tokenizer.id_to_token(token_id) or ""
        # Decoders drop the space of what they take for the first word of a text.
        return f" {text}" if token.startswith(SENTENCEPIECE_SPACE) and not text.startswith(" ") else text

    def _find_eos_ids(self, folder: Path, tokenizer_config: dict[str, Any]) -> frozenset[int]:
        eos_ids: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            config = _read_json(folder / name)
            for part in (config, config.get("text_config") or {}):
                eos_ids.update(_as_ids(part.get("eos_token_id")))
        token = _special_tokens(tokenizer_config).get("eos_token")
        if token is not None and (token_id := self._tokenizer.token_to_id(token)) is not None:
            eos_ids.add(token_id)
        return frozenset(eos_ids)


def _load_tokenizer(folder: Path) -> HfTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json. Make one from the model's own tokenizer with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        tokenizer = HfTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every file that it cannot read
        raise ModelError(f"{path} cannot be read: {error}") from error
    # Some files carry settings of the training run, which would cut or fill up prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_template(folder: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else tokenizer_config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return None if source is None else ChatTemplate(source, _special_tokens(tokenizer_config))


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on: each is a string, or a dictionary with its text under "content"."""
    found = {name: value for name, value in tokenizer_config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value
