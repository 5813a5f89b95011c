"""What a choice's text says, however long it is."""

from flowkv.server.tools.answer import MAX_PUSHED, Answer
from flowkv.server.tools.feed import Piece, Text
from flowkv.server.tools.formats import FORMATS
from flowkv.server.tools.plan import ToolPlan
from flowkv.server.tools.reader import PlainReader, ToolReader
from flowkv.types import FinishReason


class Pushed(PlainReader):
    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def push(self, text: str) -> list[Piece]:
        self._lengths.append(len(text))
        return super().push(text)


def test_a_reader_gets_no_more_at_once_than_it_reads_fast() -> None:
    lengths: list[int] = []
    answer = Answer(ToolPlan(new_reader=lambda: Pushed(lengths)))
    text = "".join(map(str, range(MAX_PUSHED)))
    assert answer.add(text, FinishReason.STOP).text == text
    assert max(lengths) == MAX_PUSHED and sum(lengths) == len(text)


def test_a_token_without_text_is_read_too() -> None:
    lengths: list[int] = []
    assert Answer(ToolPlan(new_reader=lambda: Pushed(lengths))).read("", None) == [Text("")]
    assert lengths == [0]


def test_text_that_follows_text_is_one_piece() -> None:
    text = "<tool_call>x" * 1000
    reader = ToolReader(FORMATS["hermes"], {}, parallel=True)
    assert reader.push(text) == [Text(text)]
