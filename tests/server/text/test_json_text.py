import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.server.text.json_text import MAX_BRACKETS, MAX_DEPTH, NestingError, check_nesting, loads_strict

texts = st.text(st.sampled_from('[]{}"\\a'), max_size=8)
values = st.recursive(texts, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3))
EVEN = json.dumps(["[]"] * 2 * MAX_DEPTH)  # enough of them for the scan not to be left out


@given(values, st.integers(0, 2))
def test_brackets_within_strings_are_no_depth(value: Any, more: int) -> None:
    wrapped = MAX_DEPTH - 2 - depth_of(value) + more
    data = f"[{EVEN}, {'[' * wrapped}{json.dumps(value)}{']' * wrapped}]".encode()
    if wrapped + depth_of(value) + 1 <= MAX_DEPTH:
        check_nesting(data)
        return
    with pytest.raises(NestingError):
        check_nesting(data)


def depth_of(value: Any) -> int:
    if isinstance(value, str):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def test_no_more_values_than_one_can_go_through() -> None:
    check_nesting(json.dumps([[]] * (MAX_BRACKETS // 2 - 1)).encode())
    with pytest.raises(NestingError):
        check_nesting(json.dumps([[]] * (MAX_BRACKETS // 2)).encode())


@pytest.mark.parametrize("text", [r'"\ud83d"', r'{"\uDC00": 1}', '"\ud83d"', "[" * 300 + "]" * 300])
def test_what_no_text_can_be_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"surrogate|nested"):
        loads_strict(text)


def test_pairs_and_escaped_backslashes_are_text() -> None:
    assert loads_strict(r'["\ud83d\ude00", "\\ud83d"]') == ["\U0001f600", r"\ud83d"]
