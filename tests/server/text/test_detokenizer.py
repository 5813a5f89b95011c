import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.server.text.detokenizer import MAX_HELD_TOKENS, Detokenizer, WindowDetokenizer
from flowkv.server.text.tokenizer import ModelTokenizer
from tests.server.bpe import make_model_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return ModelTokenizer(make_model_folder(tmp_path_factory.mktemp("bpe")))


def pieces(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@given(st.text())
def test_any_text_comes_back_in_pieces(tokenizer: ModelTokenizer, text: str) -> None:
    assert "".join(pieces(tokenizer.detokenizer(skip_special_tokens=True), tokenizer.encode(text))) == text


@given(st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_no_piece_shows_half_a_character(tokenizer: ModelTokenizer, text: str) -> None:
    shown = pieces(tokenizer.detokenizer(skip_special_tokens=True), tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in shown)


@given(st.lists(st.integers(0, 255)))
def test_bytes_stream_as_they_decode_at_once(token_ids: list[int]) -> None:
    toy = ByteTokenizer()
    assert "".join(pieces(toy.detokenizer(skip_special_tokens=True), token_ids)) == toy.decode(token_ids)


@given(st.lists(st.integers(0, 320)))
def test_any_ids_give_some_text(tokenizer: ModelTokenizer, token_ids: list[int]) -> None:
    shown = "".join(pieces(tokenizer.detokenizer(skip_special_tokens=False), token_ids))
    assert shown.replace("\ufffd", "") == tokenizer.decode(token_ids).replace("\ufffd", "")


def test_special_tokens_are_shown_or_skipped(tokenizer: ModelTokenizer) -> None:
    token_ids = tokenizer.encode("hi<end> you")
    assert "".join(pieces(tokenizer.detokenizer(skip_special_tokens=True), token_ids)) == "hi you"
    assert "".join(pieces(tokenizer.detokenizer(skip_special_tokens=False), token_ids)) == "<bos>hi<end> you"


@pytest.mark.parametrize("token", ["\u00ff", "<end>"], ids=["noise", "skipped"])
def test_the_window_stays_short(tokenizer: ModelTokenizer, token: str) -> None:
    longest = 0

    def decode(token_ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return tokenizer.decode(token_ids)

    token_id = tokenizer._tokenizer.token_to_id(token)
    assert token_id is not None
    detokenizer = WindowDetokenizer(decode, tokenizer._special_ids)
    shown = pieces(detokenizer, [token_id] * 1000)
    assert longest <= 2 * MAX_HELD_TOKENS
    assert len("".join(shown)) == (0 if token == "<end>" else 1000)


def test_leading_spaces_survive_a_decoder_that_drops_the_first() -> None:
    def decode(token_ids: list[int]) -> str:
        return "".join(f" w{token_id}" for token_id in token_ids).removeprefix(" ")

    assert pieces(WindowDetokenizer(decode, frozenset({9})), [1, 9, 2, 3]) == ["w1", "", " w2", " w3", ""]
