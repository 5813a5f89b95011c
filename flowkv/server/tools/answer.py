"""One choice's answer: thought, text and tool calls, told apart while they come."""

from dataclasses import dataclass, field

from flowkv.server.tools.feed import Arguments, CallBegin, Piece, Reasoning, Text
from flowkv.server.tools.plan import ToolPlan
from flowkv.server.tools.reader import call_id
from flowkv.types import FinishReason

MAX_PUSHED = 4096  # characters: readers take the square of what they get at once, and an answer may be long
TOOL_CALLS = "tool_calls"  # the reason why an answer with calls has ended, in OpenAI's words


@dataclass(slots=True)
class CallPart:
    """What is new of one call; its beginning has the id and the name."""

    index: int
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class AnswerPart:
    """What is new. `is_empty`: nothing that a reader would miss."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)
    is_empty: bool = True


class Answer:
    def __init__(self, plan: ToolPlan) -> None:
        self.finish_reason: str | None = None
        self._plan = plan
        self._reader = plan.new_reader()
        self._num_calls = 0

    def read(self, text: str, finish_reason: FinishReason | None) -> list[Piece]:
        """What is new, in its order."""
        parts = [text[at : at + MAX_PUSHED] for at in range(0, len(text), MAX_PUSHED)] or [""]
        pieces = [piece for part in parts for piece in self._reader.push(part)]
        if finish_reason is not None:
            pieces += self._reader.finish()
        for piece in pieces:
            if isinstance(piece, CallBegin):
                self._num_calls += 1
        has_called = finish_reason is FinishReason.STOP and self._num_calls > 0
        self.finish_reason = TOOL_CALLS if has_called else finish_reason
        return pieces

    def add(self, text: str, finish_reason: FinishReason | None) -> AnswerPart:
        index = self._num_calls - 1
        pieces = self.read(text, finish_reason)
        part = AnswerPart(is_empty=not pieces)
        for piece in pieces:
            match piece:
                case Text(text=more):
                    part.text += more
                case Reasoning(text=more):
                    part.reasoning += more
                case CallBegin(name=name):
                    index += 1
                    part.calls.append(CallPart(index, call_id(self._plan.id_length), name))
                case Arguments(text=more):
                    if not part.calls:
                        part.calls.append(CallPart(index))
                    part.calls[-1].arguments += more
        return part
