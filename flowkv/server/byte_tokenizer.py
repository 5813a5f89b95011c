"""The tokenizer of toy serving: no model, a token is a byte of UTF-8."""

from flowkv.grammar.vocabulary import Vocabulary
from flowkv.server.detokenizer import ByteDetokenizer


class ByteTokenizer:
    eos_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_piece(self, token_id: int) -> str:
        return self.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def detokenizer(self, *, skip_special_tokens: bool) -> ByteDetokenizer:
        return ByteDetokenizer()

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of_bytes()
