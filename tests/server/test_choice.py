from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flowkv.server.choice import Choice, Delta
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.server.text.stop_strings import StopStrings
from flowkv.types import FinishReason, Output, TokenLogprobs


def make(*stops: str, min_tokens: int = 0, include_stop: bool = False) -> Choice:
    detokenizer = ByteTokenizer().detokenizer(skip_special_tokens=True)
    return Choice(0, detokenizer, StopStrings(stops, include_stop), min_tokens)


def output(index: int, text: str, reason: FinishReason | None = None, *, stop_token_id: int | None = None) -> Output:
    token_ids = list(text.encode())
    logprobs = [TokenLogprobs(token_id, -1.0) for token_id in token_ids]
    return Output("r0", 0, index, token_ids, reason, stop_token_id, logprobs)


def text_of(deltas: list[Delta | None]) -> str:
    return "".join(delta.text for delta in deltas if delta is not None)


@given(st.text(min_size=1, max_size=20), st.data())
def test_any_order_of_arrival_gives_the_same_text(text: str, data: st.DataObject) -> None:
    token_ids = list(text.encode())
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, len(token_ids) - 1))), len(token_ids)})
    parts = [
        Output("r0", 0, start, token_ids[start:stop], FinishReason.LENGTH if stop == len(token_ids) else None)
        for start, stop in pairwise(cuts)
    ]
    choice = make()
    deltas = [choice.accept(part) for part in data.draw(st.permutations(parts))]
    assert text_of(deltas) == text
    assert [token_id for delta in deltas if delta for token_id in delta.token_ids] == token_ids
    assert choice.finish_reason is FinishReason.LENGTH


@given(st.text(min_size=1, max_size=20), st.integers(0, 20))
def test_a_new_attempt_goes_on_where_the_old_one_ended(text: str, num_before: int) -> None:
    choice = make()
    token_ids = list(text.encode())
    deltas = [choice.accept(Output("r0", 0, i, [t])) for i, t in enumerate(token_ids[:num_before])]
    choice.accept(Output("r0", 0, len(token_ids) + 5, [1]))  # ahead of a gap that now never closes
    choice.restart()
    deltas += [choice.accept(Output("r0", 0, i, [t])) for i, t in enumerate(token_ids)]
    deltas.append(choice.accept(Output("r0", 0, len(token_ids), [], FinishReason.LENGTH)))
    assert text_of(deltas) == text
    assert choice.num_tokens == len(token_ids)


def test_what_an_old_attempt_sent_ahead_is_forgotten() -> None:
    choice = make()
    choice.accept(output(0, "h"))
    choice.accept(output(2, "X"))
    choice.restart()
    assert text_of([choice.accept(output(index, char)) for index, char in enumerate("hey!")]) == "ey!"


def test_a_stop_string_ends_the_choice_and_what_follows_is_dropped() -> None:
    choice = make("END")
    deltas = [choice.accept(output(0, "hi E")), choice.accept(output(4, "NDxyz"))]
    assert text_of(deltas) == "hi "
    last = deltas[-1]
    assert last is not None
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "END")
    assert bytes(last.token_ids) == b"ND"
    assert len(last.logprobs) == 2
    assert choice.accept(output(9, "more")) is None


def test_a_stop_string_in_the_last_token_is_found() -> None:
    choice = make("END", include_stop=True)
    delta = choice.accept(output(0, "hi END", FinishReason.LENGTH))
    assert delta is not None
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("hi END", FinishReason.STOP, "END")


def test_held_back_text_comes_out_at_the_end() -> None:
    choice = make("END")
    assert text_of([choice.accept(output(0, "hi EN")), choice.accept(output(5, "", FinishReason.LENGTH))]) == "hi EN"


def test_stop_strings_wait_for_min_tokens() -> None:
    choice = make("a", min_tokens=2)
    delta = choice.accept(output(0, "aaaa"))
    assert delta is not None
    assert (delta.text, choice.num_tokens) == ("aa", 3)


def test_a_stop_id_is_counted_and_not_shown() -> None:
    delta = make().accept(output(0, "hi!", FinishReason.STOP, stop_token_id=ord("!")))
    assert delta is not None
    assert (delta.text, len(delta.token_ids), delta.stop_reason) == ("hi", 3, ord("!"))
    delta = make(include_stop=True).accept(output(0, "hi!", FinishReason.STOP, stop_token_id=ord("!")))
    assert delta is not None
    assert delta.text == "hi!"


def test_failures_do_not_wait_for_a_gap() -> None:
    choice = make()
    delta = choice.accept(Output("r0", 0, 7, [], FinishReason.ERROR, error="lost"))
    assert delta is not None
    assert (delta.finish_reason, delta.error) == (FinishReason.ERROR, "lost")


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    delta = make().accept(Output("r0", 0, 0, [0xC3], FinishReason.LENGTH))
    assert delta is not None
    assert delta.text == "\ufffd"
