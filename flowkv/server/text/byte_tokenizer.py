"""The tokenizer of toy serving: no model, a token is a byte of UTF-8."""

import json

from tokenizers import decoders

from flowkv.grammar.vocabulary import BYTE_END_ID, small_tokenizer
from flowkv.server.text.chat_template import Conversation
from flowkv.server.text.detokenizer import ByteDetokenizer


class ByteTokenizer:
    eos_token_ids: frozenset[int] = frozenset()
    chat_template: str | None = None
    tool_template = "{{ tools }}<tool_call>"  # as if there were one, and of the format that most models write
    grammar_end_ids: frozenset[int] = frozenset({BYTE_END_ID})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(self, conversation: Conversation) -> list[int]:
        lines = [f"tools: {json.dumps(conversation.tools)}\n"] if conversation.tools else []
        for message in conversation.messages:
            calls = f" {json.dumps(message['tool_calls'])}" if "tool_calls" in message else ""
            lines.append(f"{message['role']}: {message['content'] or ''}{calls}\n")
        if conversation.continue_final_message:
            return self.encode("".join(lines).removesuffix("\n"))
        return self.encode("".join(lines) + ("assistant: " if conversation.add_generation_prompt else ""))

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_piece(self, token_id: int) -> str:
        return self.token_text(token_id)

    def is_token(self, text: str) -> bool:
        return False

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def detokenizer(self, *, skip_special_tokens: bool, kept: tuple[str, ...] = ()) -> ByteDetokenizer:
        return ByteDetokenizer()

    def small(self) -> str:
        return small_tokenizer(decoders.ByteLevel())
