"""How one conversation's thoughts are told from its answers."""

from dataclasses import dataclass, replace
from functools import partial

import msgspec

from flowkv.server.bodies.structured import Constraint
from flowkv.server.reasoning.counter import NewCounter, NoThought, ThoughtCounter
from flowkv.server.reasoning.lead import thought_lead
from flowkv.server.reasoning.reader import ThoughtReader
from flowkv.server.reasoning.thought_format import FORMATS, Beginning, ThoughtStart, find_format
from flowkv.server.text.tokenizer import Tokenizer
from flowkv.server.tools.plan import ToolPlan

NUM_END_TOKENS = 32  # of a prompt: no marker, with the white space around it, takes more


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """`new_counter` is None where thoughts are part of the text."""

    tools: ToolPlan  # which reads what comes after the thought
    new_counter: NewCounter | None = None


class ReasoningPlanner:
    """For one model."""

    def __init__(self, tokenizer: Tokenizer, parser: str) -> None:
        """`parser` as `server.reasoning_parser`."""
        name = find_format(tokenizer.chat_template or "") if parser == "auto" else parser
        self._tokenizer = tokenizer
        self._format = FORMATS.get(name or "")

    def plan(self, tools: ToolPlan, prompt_ids: list[int], continued: str, *, is_shown: bool) -> AnswerPlan:
        """What the assistant is to go on with is `continued`. A thought is left out unless `is_shown`."""
        if self._format is None:
            return AnswerPlan(tools)
        prompt_end = self._tokenizer.decode(prompt_ids[-NUM_END_TOKENS:])
        match self._format.beginning(prompt_end, continued):
            case Beginning.AFTER:
                return AnswerPlan(tools, NoThought)
            case beginning:
                start = ThoughtStart(self._format, beginning is Beginning.INSIDE, tools.opening)
                return self._thinking(start, tools, is_shown=is_shown)

    def _thinking(self, start: ThoughtStart, tools: ToolPlan, *, is_shown: bool) -> AnswerPlan:
        lead = thought_lead(start.format, self._tokenizer.is_token, is_open=start.is_open)
        if tools.constraint is not None and not lead:
            return AnswerPlan(tools, NoThought)  # which the grammar leaves no place for
        plan = replace(
            tools,
            new_reader=lambda: ThoughtReader(start, tools.new_reader(), is_shown=is_shown),
            constraint=_led(tools.constraint, lead),
            markers=(*tools.markers, *start.format.markers),
        )
        return AnswerPlan(plan, partial(ThoughtCounter, start, self._tokenizer.token_bytes))


def _led(constraint: Constraint | None, lead: str) -> Constraint | None:
    """The thought is free, and the answer after it bound."""
    if constraint is None:
        return None
    return msgspec.structs.replace(constraint, grammar=msgspec.structs.replace(constraint.grammar, lead=lead))
