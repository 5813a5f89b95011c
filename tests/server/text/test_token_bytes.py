from pathlib import Path

import pytest

from flowkv.server.answers.logprobs import chat_logprobs, completion_logprobs
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.server.text.token_bytes import token_bytes
from flowkv.server.text.tokenizer import ModelTokenizer, Tokenizer
from flowkv.types import TokenLogprobs
from tests.server.bpe import make_model_folder

TEXT = "a 😀 né 你 !"


@pytest.fixture(params=["bpe", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return ModelTokenizer(make_model_folder(tmp_path)) if request.param == "bpe" else ByteTokenizer()


def ids_of(tokenizer: Tokenizer) -> list[int]:
    return [token_id for token_id in tokenizer.encode(TEXT) if not tokenizer.token_text(token_id).startswith("<")]


def test_the_bytes_of_tokens_join_to_the_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer)
    assert any("\ufffd" in tokenizer.token_text(token_id) for token_id in ids)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == TEXT
    entries = chat_logprobs(tokenizer, [TokenLogprobs(token_id, -1.0) for token_id in ids]).content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == TEXT


def test_offsets_stay_with_the_text_after_a_character_that_is_cut(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer)
    shape = completion_logprobs(tokenizer, list(ids), 3)
    last = shape.tokens[-1]
    assert shape.text_offset[0] == 3
    assert (" " + TEXT)[shape.text_offset[-1] - 2 :] == last


def test_byte_fallback_of_sentencepiece() -> None:
    assert token_bytes("\ufffd", "<0xE2>") == b"\xe2"
    assert token_bytes("plain", "plain") == b"plain"
