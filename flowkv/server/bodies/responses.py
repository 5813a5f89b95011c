"""The body of `POST /v1/responses`, and the chat that it stands for."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from flowkv.errors import RequestError
from flowkv.server.bodies.chat import MAX_MESSAGES, ChatBody
from flowkv.server.bodies.generation import NumLogprobs, Positive, decode
from flowkv.server.bodies.message import ChatMessage, ContentPart, FunctionCall, ToolCall
from flowkv.server.bodies.structured import Constraint, JsonSchema, OutputFormat
from flowkv.server.bodies.tools import MAX_TOOLS, Function, FunctionChoice, FunctionName, NamedTool, Tool, ToolChoice

LOGPROBS = "message.output_text.logprobs"  # in `include`


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message (`type` may be left out), a thought before one, a call that was made, or what came of one."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None

    def message(self, where: str) -> ChatMessage:
        """Raises `RequestError` (400)."""
        match self.type:
            case "function_call":
                function = FunctionCall(_needed(self.name, where, "name"), _needed(self.arguments, where, "arguments"))
                call = ToolCall(id=_needed(self.call_id, where, "call_id"), function=function)
                message = ChatMessage("assistant", tool_calls=[call])
            case "reasoning":
                message = ChatMessage("assistant", reasoning_content=ChatMessage("assistant", self.content).text or "")
            case "function_call_output":
                output = _needed(self.output, where, "output")
                message = ChatMessage("tool", output, tool_call_id=_needed(self.call_id, where, "call_id"))
            case _:
                message = ChatMessage(_needed(self.role, where, "role"), self.content)
        message.check(where)
        return message


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(msgspec.Struct, frozen=True):
    type: Literal["function"]
    name: FunctionName


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    format: TextFormat | None = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    effort: str | None = None


class ResponsesChat(ChatBody, frozen=True, kw_only=True):
    """Its messages come from `input`, and its format from `text`."""

    prompt_field: ClassVar[str] = "input"

    @property
    def constraint(self) -> Constraint | None:
        found = super().constraint
        return None if found is None else Constraint(found.grammar, "text")


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True):
    """`store` is taken and nothing is ever stored, so what refers to an earlier answer is refused."""

    unsupported: ClassVar[tuple[str, ...]] = ("previous_response_id", "conversation", "background", "prompt")

    input: Annotated[str, Meta(min_length=1)] | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    store: bool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None

    def check(self) -> None:
        """What no type can say. Raises `RequestError` (400)."""
        for name in self.unsupported:
            if getattr(self, name):
                raise RequestError(f"{name} is not supported: no answer is stored", param=name)

    def chat(self) -> ResponsesChat:
        """Raises `RequestError` (400) naming the field of this body."""
        logprobs = LOGPROBS in (self.include or [])
        body = ResponsesChat(
            messages=self._messages(),
            model=self.model,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=logprobs,
            top_logprobs=self.top_logprobs if logprobs else None,
            tools=[_tool(tool) for tool in self.tools or []],
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._output_format(),
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            stream=self.stream,
        )
        body.check()
        return body

    def _messages(self) -> list[ChatMessage]:
        messages = [] if self.instructions is None else [ChatMessage("system", self.instructions)]
        if isinstance(self.input, str):
            return [*messages, ChatMessage("user", self.input)]
        for number, item in enumerate(self.input):
            message = item.message(f"input[{number}]")
            last = messages[-1] if messages else None
            if last is not None and last.is_thought and message.role == "assistant":
                messages[-1] = _with_thought(message, last)
            elif last is not None and message.tool_calls and last.role == "assistant":
                messages[-1] = _with_calls(last, message.tool_calls)
            else:
                messages.append(message)
        return messages

    def _output_format(self) -> OutputFormat | None:
        found = None if self.text is None else self.text.format
        if found is None:
            return None
        if found.type == "json_schema" and found.schema is None:
            raise RequestError("text.format.schema is missing", param="text")
        return OutputFormat(type=found.type, json_schema=JsonSchema(name=found.name, schema=found.schema))


_decoder = msgspec.json.Decoder(ResponsesBody)


def decode_responses(data: bytes) -> ResponsesBody:
    """Raises `RequestError` (400) naming the field."""
    body = decode(_decoder, data)
    body.check()
    return body


def _with_calls(message: ChatMessage, calls: list[ToolCall]) -> ChatMessage:
    """Items of one turn are one message to a template."""
    return msgspec.structs.replace(message, tool_calls=[*(message.tool_calls or []), *calls])


def _with_thought(message: ChatMessage, thought: ChatMessage) -> ChatMessage:
    """It may be one more thought."""
    thoughts = [part for part in (thought.reasoning_content, message.reasoning_content) if part]
    return msgspec.structs.replace(message, reasoning_content="\n".join(thoughts))


def _tool(tool: FunctionTool) -> Tool:
    return Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))


def _choice(choice: Literal["none", "auto", "required"] | NamedFunction | None) -> ToolChoice | None:
    return NamedTool("function", FunctionChoice(choice.name)) if isinstance(choice, NamedFunction) else choice


def _needed(value: Any, where: str, name: str) -> Any:
    if value is None:
        raise RequestError(f"{where}.{name} is missing", param="input")
    return value
