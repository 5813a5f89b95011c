"""The tokens of a model as a grammar sees them: the bytes of each, and those that end an answer."""

from functools import cache
from pathlib import Path

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer, models

from flowkv.errors import GrammarError
from flowkv.model_files import eos_token_ids, load_tokenizer

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

    @classmethod
    def to_compile_for(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Of next to no tokens but those that a grammar can name; quick to make, with the same verdict on grammars.

        Raises `GrammarError` where no grammar can bind the model.
        """
        small = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        small.decoder = tokenizer.decoder
        small.add_special_tokens(
            ["<|end|>", *(token.content for token in tokenizer.get_added_tokens_decoder().values())]
        )
        return cls(_tokens(small, frozenset({1}), small.get_vocab_size()))

    @staticmethod
    @cache
    def of_bytes() -> "Vocabulary":
        """Of toy serving, where a token is a byte."""
        return Vocabulary(LLTokenizer(TokenizerWrapper(_Bytes())))


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
