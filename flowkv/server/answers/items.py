"""The output of `/v1/responses`: items that open, grow and close, and the events that say so."""

import uuid
from typing import Any, Literal

import msgspec

from flowkv.server.answers.logprobs import ChatTokenLogprob
from flowkv.server.tools.feed import Arguments, CallBegin, Piece, Reasoning, Text
from flowkv.server.tools.reader import call_id

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct):
    text: str = ""
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    content: list[OutputText]
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"


class OutputCall(msgspec.Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


class ReasoningText(msgspec.Struct):
    text: str = ""
    type: Literal["reasoning_text"] = "reasoning_text"


class OutputReasoning(msgspec.Struct, tag_field="type", tag="reasoning"):
    id: str
    content: list[ReasoningText]
    status: Status = "in_progress"
    summary: list[Any] = []  # there is none: the text is there


OutputItem = OutputMessage | OutputReasoning | OutputCall
Event = tuple[str, dict[str, Any]]  # its type, and its fields


class ResponseItems:
    """`take` and `close` return the events of what they did."""

    def __init__(self, id_length: int) -> None:
        self.items: list[Any] = []  # of OutputItem, the last of which may be open
        self._id_length = id_length
        self._is_open = False
        self._logprobs: list[ChatTokenLogprob] = []  # of text that is still held back

    def take(self, pieces: list[Piece], logprobs: list[ChatTokenLogprob], num_thought_tokens: int) -> list[Event]:
        """Of the tokens whose text is not out, so many belong to a thought, which has no log probabilities."""
        self._logprobs += logprobs
        del self._logprobs[:num_thought_tokens]
        events: list[Event] = []
        for piece in pieces:
            match piece:
                case Text(text=text) if text:
                    events += self._take_text(text)
                case Reasoning(text=text):
                    events += self._take_reasoning(text)
                case CallBegin(name=name):
                    events += self._begin_call(name)
                case Arguments(text=text):
                    self._last.arguments += text
                    events.append(self._event("response.function_call_arguments.delta", delta=text))
        return events

    def close(self, status: Status) -> list[Event]:
        """No more comes; an answer of nothing is a message of nothing."""
        opening = [] if self.items else self._open_message()
        if self._is_open and isinstance(self._last, OutputMessage):
            self._last.content[0].logprobs += self._logprobs  # of tokens that end it, and are no text
        return opening + self._close_last(status)

    def _take_text(self, text: str) -> list[Event]:
        events = [] if self._is_open and isinstance(self._last, OutputMessage) else self._open_message()
        logprobs, self._logprobs = self._logprobs, []
        part = self._last.content[0]
        part.text += text
        part.logprobs += logprobs
        return [*events, self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)]

    def _take_reasoning(self, text: str) -> list[Event]:
        """A thought is the first of all."""
        events = [] if self.items else self._open(OutputReasoning(f"rs_{uuid.uuid4().hex}", []), ReasoningText())
        self._last.content[0].text += text
        return [*events, self._part_event("response.reasoning_text.delta", delta=text)]

    def _open_message(self) -> list[Event]:
        return self._open(OutputMessage(f"msg_{uuid.uuid4().hex}", []), OutputText())

    def _open(self, item: OutputMessage | OutputReasoning, part: OutputText | ReasoningText) -> list[Event]:
        """It is added before its part."""
        events = self._close_last("completed")
        self.items.append(item)
        self._is_open = True
        events.append(self._added())
        self._last.content = [part]
        return [*events, self._part_event("response.content_part.added", part=_copy(part))]

    def _begin_call(self, name: str) -> list[Event]:
        events = self._close_last("completed")
        self.items.append(OutputCall(f"fc_{uuid.uuid4().hex}", call_id(self._id_length), name))
        self._is_open = True
        return [*events, self._added()]

    def _close_last(self, status: Status) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self._last
        item.status = status
        return [*self._done(item), ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})]

    def _done(self, item: OutputItem) -> list[Event]:
        match item:
            case OutputCall(arguments=arguments, name=name):
                return [self._event("response.function_call_arguments.done", arguments=arguments, name=name)]
            case OutputReasoning(content=[part]):
                event = self._part_event("response.reasoning_text.done", text=part.text)
            case OutputMessage(content=[part]):
                event = self._part_event("response.output_text.done", text=part.text, logprobs=part.logprobs)
        return [event, self._part_event("response.content_part.done", part=part)]

    @property
    def _last(self) -> Any:
        return self.items[-1]

    def _added(self) -> Event:
        return "response.output_item.added", {"output_index": len(self.items) - 1, "item": _copy(self._last)}

    def _event(self, kind: str, **fields: Any) -> Event:
        return kind, {"item_id": self._last.id, "output_index": len(self.items) - 1, **fields}

    def _part_event(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, content_index=0, **fields)


def _copy(value: Any) -> Any:
    """As it is now: an event is encoded after what follows it has happened."""
    return msgspec.to_builtins(value)
