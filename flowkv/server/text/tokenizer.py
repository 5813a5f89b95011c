"""Text to token ids and back, from the files of a Hugging Face model folder, without `transformers`."""

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from flowkv.errors import RequestError
from flowkv.grammar.vocabulary import small_tokenizer
from flowkv.model_files import eos_token_ids, load_tokenizer, read_json, special_tokens
from flowkv.server.text.chat_template import ChatTemplate, Conversation
from flowkv.server.text.detokenizer import Detokenizer, WindowDetokenizer
from flowkv.server.text.token_bytes import token_bytes

TEMPLATES = ("default", "tool_use")
SENTENCEPIECE_SPACE = "\u2581"


class Tokenizer(Protocol):
    """`eos_token_ids` end a choice unless the client asks to ignore them."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def chat_template(self) -> str | None:
        """The source of the one that most conversations go through; None where there is none."""
        ...

    @property
    def tool_template(self) -> str | None:
        """The source of the chat template that shows tools; None where no template does."""
        ...

    @property
    def grammar_end_ids(self) -> frozenset[int]:
        """What ends a choice that follows a grammar; empty where there is no such token."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A plain prompt, with the special tokens that the model expects around it unless they are not wanted."""
        ...

    def encode_chat(self, conversation: Conversation) -> list[int]:
        """A conversation up to where the assistant begins or goes on. Raises `RequestError` where it cannot be."""
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

    def is_token(self, text: str) -> bool:
        """One that was added to the vocabulary as a whole, as markers are."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What it adds to the text in UTF-8; maybe a part of a character."""
        ...

    def detokenizer(self, *, skip_special_tokens: bool, kept: tuple[str, ...] = ()) -> Detokenizer:
        """`kept` are special tokens that show in the text nevertheless."""
        ...

    def small(self) -> str:
        """A small one to compile grammars for (`small_tokenizer`). Raises `GrammarError` where none can bind this."""
        ...


class ModelTokenizer:
    """`tokenizer.json` by the `tokenizers` library, and the chat template beside it."""

    def __init__(self, folder: Path) -> None:
        """Raises `ModelError` where the folder holds no readable tokenizer."""
        self._tokenizer = load_tokenizer(folder)
        config = read_json(folder / "tokenizer_config.json")
        self._templates = _load_templates(folder, config)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = frozenset(token.content for token in added.values())
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_ids = eos_token_ids(folder, self._tokenizer)
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    @property
    def grammar_end_ids(self) -> frozenset[int]:
        return self.eos_token_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._encode(text, add_special_tokens)

    @property
    def chat_template(self) -> str | None:
        template = self._template(with_tools=False)
        return None if template is None else template.source

    @property
    def tool_template(self) -> str | None:
        template = self._template(with_tools=True)
        return template.source if template is not None and template.takes_tools else None

    def encode_chat(self, conversation: Conversation) -> list[int]:
        template = self._template(with_tools=conversation.tools is not None)
        if template is None:
            raise RequestError("this model has no chat template: use /v1/completions", code="no_chat_template")
        # The template writes the special tokens itself.
        return self._encode(template.render(conversation), False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """`encode` would also say where in the text each token stands, which takes a quarter of its time."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def detokenizer(self, *, skip_special_tokens: bool, kept: tuple[str, ...] = ()) -> WindowDetokenizer:
        if not skip_special_tokens:
            return WindowDetokenizer(self.decode, frozenset())
        return WindowDetokenizer(self.decode, self._special_ids - {self._tokenizer.token_to_id(text) for text in kept})

    def token_piece(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def small(self) -> str:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return small_tokenizer(self._tokenizer.decoder, [token.content for token in added])

    def is_token(self, text: str) -> bool:
        return text in self._added

    def token_bytes(self, token_id: int) -> bytes:
        return token_bytes(self.token_text(token_id), self._tokenizer.id_to_token(token_id))

    def _template(self, *, with_tools: bool) -> ChatTemplate | None:
        """Some models have one of its own for conversations with tools."""
        default = self._templates.get("default")
        return self._templates.get("tool_use", default) if with_tools else default

    def _token_text(self, token_id: int) -> str:
        text = self.decode([token_id])
        token = self._tokenizer.id_to_token(token_id) or ""
        # Decoders drop the space of what they take for the first word of a text.
        return f" {text}" if token.startswith(SENTENCEPIECE_SPACE) and not text.startswith(" ") else text


def _load_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, ChatTemplate]:
    """By name: "default", and maybe others for some uses."""
    path = folder / "chat_template.jinja"
    found = path.read_text(encoding="utf-8") if path.is_file() else tokenizer_config.get("chat_template")
    if isinstance(found, list):
        sources = {entry["name"]: entry["template"] for entry in found}
    else:
        sources = {} if found is None else {"default": found}
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        sources[path.stem] = path.read_text(encoding="utf-8")
    tokens = special_tokens(tokenizer_config)
    return {name: ChatTemplate(source, tokens) for name, source in sources.items() if name in TEMPLATES}
