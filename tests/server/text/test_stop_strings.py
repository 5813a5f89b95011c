from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.server.text.stop_strings import StopStrings

PIECES = st.lists(st.text(alphabet="ab", min_size=1, max_size=2), max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3)


def feed(stops: StopStrings, pieces: list[str]) -> str:
    shown = ""
    for piece in pieces:
        shown += stops.push(piece)
        if stops.matched is not None:
            return shown
    return shown + stops.flush()


def naive(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@settings(max_examples=500)
@given(PIECES, STOPS, st.booleans())
def test_same_as_searching_the_whole_text(pieces: list[str], stops: list[str], include_stop: bool) -> None:
    stop_strings = StopStrings(tuple(stops), include_stop)
    shown = feed(stop_strings, pieces)
    assert (shown, stop_strings.matched) == naive("".join(pieces), stops, include_stop)


@given(PIECES, STOPS)
def test_nothing_is_held_back_without_need(pieces: list[str], stops: list[str]) -> None:
    stop_strings = StopStrings(tuple(stops))
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += stop_strings.push(piece)
        if stop_strings.matched is not None:
            return
        held = text[len(shown) :]
        assert text == shown + held
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_spread_over_pieces_never_leaks() -> None:
    stops = StopStrings(("</end>",))
    assert [stops.push(piece) for piece in ("hi <", "/e", "nd", "> more")] == ["hi ", "", "", ""]
    assert stops.matched == "</end>"


def test_what_only_looked_like_one_comes_out() -> None:
    stops = StopStrings(("</end>",))
    assert [stops.push("a </e"), stops.push("x"), stops.push("<")] == ["a ", "</ex", ""]
    assert stops.flush() == "<"
