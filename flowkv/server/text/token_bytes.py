"""The bytes that a token stands for. A character may be cut across tokens, so a token's text alone cannot say."""

import re
from functools import cache

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of SentencePiece vocabularies


def token_bytes(text: str, piece: str | None) -> bytes:
    """`text` is the token decoded alone, `piece` its entry in the vocabulary."""
    if "\ufffd" not in text or piece is None:
        return text.encode()
    if (match := _BYTE_FALLBACK.fullmatch(piece)) is not None:
        return bytes([int(match[1], 16)])
    byte_of = _byte_level_alphabet()
    if all(character in byte_of for character in piece):
        return bytes(byte_of[character] for character in piece)
    return text.encode()


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (GPT-2's) writes bytes as: printable ones as themselves, others moved up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
