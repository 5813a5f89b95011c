"""Every example of a thought, whole and cut everywhere."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.server.reasoning.reader import ThoughtReader
from flowkv.server.reasoning.thought_format import FORMATS, ThoughtStart
from flowkv.server.tools.feed import Arguments, CallBegin, Reasoning, Text
from flowkv.server.tools.formats import FORMATS as TOOL_FORMATS
from flowkv.server.tools.reader import AnswerReader, NamedReader, PlainReader, ToolReader

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'

# (format, whether the prompt has opened it, text, thought, what is left of the text, calls)
Case = tuple[str, bool, str, str, str, list[str]]
CASES: list[Case] = [
    ("think", True, "Hm, two.\n</think>\n\nTwo.", "Hm, two.", "Two.", []),
    ("think", True, "\nHm.</think>Two. </think> \n", "Hm.", "Two. </think> \n", []),
    ("think", True, "<think>\nHm.\n</think>Two.", "Hm.", "Two.", []),
    ("think", True, "Hm, two", "Hm, two", "", []),
    ("think", True, "Hm </thin", "Hm </thin", "", []),
    ("think", True, "</think>\n\nTwo.", "", "Two.", []),
    ("think", True, "Hm.</think>", "Hm.", "", []),
    ("think", True, "", "", "", []),
    ("think", True, f"I call {CALL}\n</think>\n{CALL}", f"I call {CALL}", "", ["f"]),
    ("think", False, "<think>\nHm.\n</think>\n\nTwo. \n", "Hm.", "Two. \n", []),
    ("think", False, "\n<think></think>\nTwo.", "", "Two.", []),
    ("think", False, "\n\n<think>a  <think> b</think>c<think>d</think>", "a  <think> b", "c<think>d</think>", []),
    ("think", False, " \n Two.", "", " \n Two.", []),
    ("think", False, "<thi", "", "<thi", []),
    ("think", False, "  <thing>", "", "  <thing>", []),
    ("think", False, "Well: <think>Hm.</think>", "", "Well: <think>Hm.</think>", []),
    ("think", False, CALL, "", "", ["f"]),
    ("think", False, f"<think>Hm.</think>Sure.\n{CALL}", "Hm.", "Sure.", ["f"]),
    ("granite", False, "Here is my thought process: Hm.\nHere is my response: Two.", "Hm.", "Two.", []),
    ("granite", False, "Here's my thought process:Here's. Here's my response:Two.", "Here's.", "Two.", []),
    ("granite", False, "Here is my response: Two.", "", "Here is my response: Two.", []),
    ("kimi", False, "\u25c1think\u25b7Hm.\u25c1/think\u25b7Two.", "Hm.", "Two.", []),
    ("mistral", False, "[THINK]Hm.[/THINK]Two.", "Hm.", "Two.", []),
    ("seed_oss", True, "Hm.</seed:think>Two.", "Hm.", "Two.", []),
]


def reader(name: str, is_open: bool, is_shown: bool = True, rest: AnswerReader | None = None) -> ThoughtReader:
    rest = rest or ToolReader(TOOL_FORMATS["hermes"], {"f": {}}, parallel=True)
    return ThoughtReader(ThoughtStart(FORMATS[name], is_open), rest, is_shown=is_shown)


def read(reader: AnswerReader, parts: Sequence[str]) -> tuple[str, str, list[str]]:
    pieces = [piece for part in parts for piece in reader.push(part)] + reader.finish()
    thought = [piece.text for piece in pieces if isinstance(piece, Reasoning)]
    assert [isinstance(piece, Reasoning) for piece in pieces[: len(thought)]] == [True] * len(thought)
    text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    return "".join(thought), text, [piece.name for piece in pieces if isinstance(piece, CallBegin)]


@pytest.mark.parametrize(("name", "is_open", "text", "thought", "rest", "calls"), CASES)
def test_what_a_text_says(name: str, is_open: bool, text: str, thought: str, rest: str, calls: list[str]) -> None:
    assert read(reader(name, is_open), [text]) == (thought, rest, calls)
    assert read(reader(name, is_open), text) == (thought, rest, calls)
    assert read(reader(name, is_open, is_shown=False), text) == ("", rest, calls)


@pytest.mark.parametrize(("name", "is_open", "text", "thought", "rest", "calls"), CASES)
def test_a_cut_at_every_place_says_the_same(
    name: str, is_open: bool, text: str, thought: str, rest: str, calls: list[str]
) -> None:
    for place in range(len(text) + 1):
        assert read(reader(name, is_open), [text[:place], text[place:]]) == (thought, rest, calls)


@given(
    st.sampled_from(sorted(FORMATS)),
    st.booleans(),
    st.lists(st.sampled_from(["<think>", "</think>", "Here is my response:", CALL, "</", "th", " ", "\n", "x"])),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_any_cut_of_any_text_says_the_same(name: str, is_open: bool, words: list[str], places: list[int]) -> None:
    text = "".join(words)
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    parts = [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    assert read(reader(name, is_open), parts) == read(reader(name, is_open), [text])


def test_a_thought_is_shown_as_it_comes() -> None:
    thinking = reader("think", True, rest=PlainReader())
    assert thinking.push("Hm, ") == [Reasoning("Hm,")]
    assert thinking.push("two <") == [Reasoning(" two")]
    assert thinking.push("b>") == [Reasoning(" <b>")]
    assert thinking.push("</think>") == []
    assert thinking.push("\n\nTwo") == [Text("Two")]
    assert thinking.push(" it is ") == [Text(" it is ")]


def test_a_named_function_is_called_after_the_thought_alone() -> None:
    thinking = reader("think", True, rest=NamedReader("f"))
    assert thinking.push("Hm.</think>\n") == [Reasoning("Hm.")]
    assert thinking.push("{}") == [CallBegin("f"), Arguments("{}")]
    cut = reader("think", True, rest=NamedReader("f"))
    assert [*cut.push("Hm"), *cut.finish()] == [Reasoning("Hm")]


CODER = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
KIMI = (
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}'
    "<|tool_call_end|><|tool_calls_section_end|>"
)
BROKEN_OFF = [
    ("qwen3_coder", f"Hm.\n\n{CODER}", "Hm.", ["f"]),
    ("qwen3_coder", f"A <tool_call> is it.\n{CODER}", "A <tool_call> is it.", ["f"]),
    ("qwen3_coder", f"A <tool_call> is it.</think>{CODER}{CODER}", "A <tool_call> is it.", ["f", "f"]),
    ("qwen3_coder", "A <tool_call> <function", "A <tool_call> <function", []),
    ("qwen3_coder", "A <tool_call>", "A <tool_call>", []),
    ("kimi_k2", f"Hm. {KIMI}", "Hm.", ["f"]),
    ("hermes", f"Hm. {CALL}", f"Hm. {CALL}", []),
]


@pytest.mark.parametrize(("name", "text", "thought", "calls"), BROKEN_OFF)
def test_a_call_breaks_off_a_thought_that_its_model_may_forget_to_close(
    name: str, text: str, thought: str, calls: list[str]
) -> None:
    known = TOOL_FORMATS[name]
    start = ThoughtStart(FORMATS["think"], True, known.opening)

    def calling() -> ThoughtReader:
        return ThoughtReader(start, ToolReader(known, {"f": {}}, parallel=True), is_shown=True)

    assert read(calling(), text) == (thought, "", calls)
    for place in range(len(text) + 1):
        assert read(calling(), [text[:place], text[place:]]) == (thought, "", calls)
