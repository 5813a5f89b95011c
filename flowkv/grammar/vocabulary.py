"""The tokens of a model as a grammar sees them: the bytes of each, and those that end an answer."""

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from flowkv.errors import GrammarError

BYTE_END_ID = 0xFF  # of toy serving: no text in UTF-8 holds this byte


class Vocabulary:
    """`end_ids` may be drawn where a grammar is complete, and nowhere else."""

    def __init__(self, tokens: LLTokenizer) -> None:
        self.tokens = tokens
        self.end_ids = frozenset(tokens.eos_tokens)

    @classmethod
    def of(cls, tokenizer: Tokenizer, end_ids: frozenset[int], num_tokens: int = 0) -> "Vocabulary":
        """Of a model, which may have more tokens than its tokenizer: of these `num_tokens` no other is ever allowed.

        Raises `GrammarError` where its answers cannot be bound by a grammar.
        """
        if not end_ids:
            raise GrammarError("this model has no end-of-sequence token, without which no grammar can end")
        num_tokens = max(num_tokens, tokenizer.get_vocab_size(with_added_tokens=True))
        try:
            return cls(LLTokenizer(tokenizer.to_str(), n_vocab=num_tokens, eos_token=sorted(end_ids)))
        except ValueError as error:
            raise GrammarError(f"the tokenizer of this model cannot be bound by a grammar: {error}") from error

    @classmethod
    def of_bytes(cls) -> "Vocabulary":
        """Of toy serving, where a token is a byte."""
        return cls(LLTokenizer(TokenizerWrapper(_Bytes())))


class _Bytes:
    """As llguidance wants a tokenizer to look."""

    eos_token_id = BYTE_END_ID
    bos_token_id = None
    tokens = tuple(bytes([byte]) for byte in range(256))
    special_token_ids = (BYTE_END_ID,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
