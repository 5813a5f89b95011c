"""One choice's answer: text and tool calls, told apart while they come."""

from dataclasses import dataclass, field

from flowkv.server.tools.feed import Arguments, CallBegin, Text
from flowkv.server.tools.plan import ToolPlan
from flowkv.server.tools.reader import call_id
from flowkv.types import FinishReason

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
    calls: list[CallPart] = field(default_factory=list)
    is_empty: bool = True


class Answer:
    def __init__(self, plan: ToolPlan) -> None:
        self.finish_reason: str | None = None
        self._plan = plan
        self._reader = plan.new_reader()
        self._num_calls = 0

    def add(self, text: str, finish_reason: FinishReason | None) -> AnswerPart:
        pieces = self._reader.push(text)
        if finish_reason is not None:
            pieces += self._reader.finish()
        part = AnswerPart(is_empty=not pieces)
        for piece in pieces:
            match piece:
                case Text(text=more):
                    part.text += more
                case CallBegin(name=name):
                    part.calls.append(CallPart(self._num_calls, call_id(self._plan.id_length), name))
                    self._num_calls += 1
                case Arguments(text=more):
                    self._open_call(part).arguments += more
        has_called = finish_reason is FinishReason.STOP and self._num_calls > 0
        self.finish_reason = TOOL_CALLS if has_called else finish_reason
        return part

    def _open_call(self, part: AnswerPart) -> CallPart:
        index = self._num_calls - 1
        if not part.calls or part.calls[-1].index != index:
            part.calls.append(CallPart(index))
        return part.calls[-1]
