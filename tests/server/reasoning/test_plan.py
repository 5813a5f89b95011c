from dataclasses import replace

import pytest

from flowkv.server.bodies.structured import Constraint
from flowkv.server.reasoning.counter import NoThought
from flowkv.server.reasoning.plan import AnswerPlan, ReasoningPlanner
from flowkv.server.reasoning.reader import ThoughtReader
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.server.tools.feed import Reasoning, Text
from flowkv.server.tools.plan import ToolPlan
from flowkv.server.tools.reader import PlainReader
from flowkv.types import Grammar, GrammarKind

TOOLS = ToolPlan(constraint=Constraint(Grammar(kind=GrammarKind.JSON_OBJECT), "response_format"), markers=("<x>",))


class Templated(ByteTokenizer):
    def __init__(self, template: str | None) -> None:
        self.chat_template = template


def plan(template: str | None, prompt: str, parser: str = "auto", continued: str = "") -> AnswerPlan:
    tokenizer = Templated(template)
    return ReasoningPlanner(tokenizer, parser).plan(TOOLS, tokenizer.encode(prompt), continued, is_shown=True)


@pytest.mark.parametrize(("template", "parser"), [(None, "auto"), ("{{ messages }}", "auto"), ("</think>", "none")])
def test_models_that_do_not_think_are_read_as_ever(template: str | None, parser: str) -> None:
    assert plan(template, "<think>\n", parser) == AnswerPlan(TOOLS)


def test_a_call_may_break_off_a_thought() -> None:
    tools = replace(TOOLS, opening=("<c>", "f"))
    found = ReasoningPlanner(Templated("</think>"), "auto").plan(tools, list(b"<think>"), "", is_shown=True)
    reader = found.tools.new_reader()
    assert [*reader.push("Hm.<c>f"), *reader.push("x")] == [Reasoning("Hm."), Text("<c>f"), Text("x")]


def test_nothing_is_looked_for_after_a_thought_that_the_prompt_has_closed() -> None:
    assert plan("</think>", "x<think>\n\n</think>\n\n") == AnswerPlan(TOOLS, NoThought)
    assert plan("</think>", "x", continued="x") == AnswerPlan(TOOLS, NoThought)


@pytest.mark.parametrize(("prompt", "start"), [("<think>\n", "start: thought"), ("assistant:", "start: (SPACE? (")])
def test_a_thought_stands_before_all_else(prompt: str, start: str) -> None:
    found = plan("</think>", "x" * 100 + prompt)
    assert isinstance(found.tools.new_reader(), ThoughtReader)
    assert found.tools.constraint is not None
    assert found.tools.constraint.param == "response_format"
    assert found.tools.constraint.grammar.kind is GrammarKind.JSON_OBJECT
    assert found.tools.constraint.grammar.lead.startswith(start)
    assert found.tools.markers == ("<x>", "<think>", "</think>")
    assert found.new_counter is not None and found.new_counter().count(list(b"<think>x</think>y")) == 16
    assert isinstance(TOOLS.new_reader(), PlainReader)


class Named(Templated):
    """Whose markers are tokens that no grammar can name."""

    def is_token(self, text: str) -> bool:
        return text in ("[THINK]", "[/THINK]")


@pytest.mark.parametrize("continued", ["", "[THINK]Hm"])
def test_an_answer_that_is_bound_from_its_first_token_has_no_thought(continued: str) -> None:
    planner = ReasoningPlanner(Named("[/THINK]"), "auto")
    assert planner.plan(TOOLS, list(b"x"), continued, is_shown=True) == AnswerPlan(TOOLS, NoThought)
    free = planner.plan(replace(TOOLS, constraint=None), list(b"x"), continued, is_shown=True)
    assert isinstance(free.tools.new_reader(), ThoughtReader)
