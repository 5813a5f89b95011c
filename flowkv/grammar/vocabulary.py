"""The tokens of a model as a grammar sees them: the bytes of each, and those that end an answer."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Decoder

from flowkv.errors import GrammarError
from flowkv.model_files import eos_token_ids, load_tokenizer

SMALL_END = "<|end|>"  # of a small tokenizer
BYTE_END_ID = 0xFF  # of toy serving: no text in UTF-8 holds this byte


class Vocabulary:
    """`end_ids` may be drawn where a grammar is complete, and nowhere else."""

    def __init__(self, tokens: LLTokenizer) -> None:
        self.tokens = tokens
        self.end_ids = frozenset(tokens.eos_tokens)

    @classmethod
    def of_folder(cls, folder: Path, num_tokens: int) -> "Vocabulary":
        """Of a model. It may have more tokens than its tokenizer: of all `num_tokens` no other is ever allowed.

        Takes seconds where there are many. Raises `ModelError` where the folder's tokenizer cannot be read,
        `GrammarError` where no grammar can bind it.
        """
        tokenizer = load_tokenizer(folder)
        num_tokens = max(num_tokens, tokenizer.get_vocab_size(with_added_tokens=True))
        return cls(_tokens(tokenizer, eos_token_ids(folder, tokenizer), num_tokens))

    @staticmethod
    @cache
    def of_bytes() -> "Vocabulary":
        """Of toy serving, where a token is a byte."""
        return Vocabulary(LLTokenizer(TokenizerWrapper(_Bytes())))

    @classmethod
    def of_small(cls, tokenizer: str) -> "Vocabulary":
        """As `small_tokenizer` makes it."""
        known = Tokenizer.from_str(tokenizer)
        end_id = known.token_to_id(SMALL_END)
        assert end_id is not None
        return cls(_tokens(known, frozenset({end_id}), known.get_vocab_size()))


def small_tokenizer(decoder: Decoder, added: Iterable[str] = ()) -> str:
    """The JSON of a tokenizer of bytes, and of the `added` tokens of a model, which a grammar can name.

    Grammars compile for it exactly as for the model's own, in no time. Raises `GrammarError` where none can bind a
    model with this decoder.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = [*alphabet, *(f"<0x{byte:02X}>" for byte in range(256))]  # whichever of them the decoder knows as bytes
    small = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    small.decoder = decoder
    small.add_special_tokens([SMALL_END, *added])
    _tokens(small, frozenset({len(pieces)}), small.get_vocab_size())
    return small.to_str()


def _tokens(tokenizer: Tokenizer, end_ids: frozenset[int], num_tokens: int) -> LLTokenizer:
    if not end_ids:
        raise GrammarError("this model has no end-of-sequence token, without which no grammar can end")
    try:
        return LLTokenizer(tokenizer.to_str(), n_vocab=num_tokens, eos_token=sorted(end_ids))
    except ValueError as error:
        raise GrammarError(f"no grammar can bind this model's tokenizer: {error}") from error


class _Bytes:
    """As llguidance wants a tokenizer to look."""

    eos_token_id = BYTE_END_ID
    bos_token_id = None
    tokens = tuple(bytes([byte]) for byte in range(256))
    special_token_ids = (BYTE_END_ID,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
