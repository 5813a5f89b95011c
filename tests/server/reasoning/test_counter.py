import pytest

from flowkv.server.reasoning.counter import NoThought, ThoughtCounter
from flowkv.server.reasoning.thought_format import FORMATS, ThoughtStart

WORDS: list[str | bytes] = [
    "<think>",
    "</think>",
    "a",
    "\n",
    "<",
    "think",
    ">",
    *(bytes([byte]) for byte in "é".encode()),
    "<think>b</think>c",
]


def token_bytes(token_id: int) -> bytes:
    word = WORDS[token_id]
    return word if isinstance(word, bytes) else word.encode()


def counter(*, is_open: bool) -> ThoughtCounter:
    return ThoughtCounter(ThoughtStart(FORMATS["think"], is_open), token_bytes)


@pytest.mark.parametrize(
    ("is_open", "ids", "number"),
    [
        (True, [2, 2, 1, 3, 2], 3),
        (True, [2, 2, 3], 3),
        (True, [1, 2], 1),
        (True, [], 0),
        (True, [7, 8, 1, 2], 3),
        (False, [3, 0, 2, 1, 2], 4),
        (False, [4, 5, 6, 2, 1, 2], 5),
        (False, [0, 1, 2], 2),
        (False, [4, 5, 2, 1], 0),
        (False, [2, 0, 2, 1], 0),
        (False, [9, 2], 1),
        (False, [0, 3], 2),
        (False, [4, 5, 6, 3, 4], 5),
    ],
)
def test_tokens_up_to_the_closing_marker_count(is_open: bool, ids: list[int], number: int) -> None:
    assert counter(is_open=is_open).count(ids) == number
    one_by_one = counter(is_open=is_open)
    assert sum(one_by_one.count([token_id]) for token_id in ids) == number
    assert NoThought().count(ids) == 0


def test_what_may_yet_be_no_thought_waits() -> None:
    waiting = counter(is_open=False)
    assert [waiting.count([token_id]) for token_id in (4, 5, 6, 2, 2, 1, 2)] == [0, 0, 3, 1, 1, 1, 0]
