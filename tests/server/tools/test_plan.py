from typing import Any

import pytest

from flowkv.config import TOOL_PARSERS
from flowkv.errors import RequestError
from flowkv.server.bodies.structured import Constraint
from flowkv.server.bodies.tools import Function, FunctionChoice, NamedTool, Tool
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.server.tools.formats import FORMATS
from flowkv.server.tools.plan import ToolPlan, ToolPlanner
from flowkv.server.tools.reader import call_id
from flowkv.types import Grammar, GrammarKind

HERMES = "{{ tools }}<tool_call>"
TOOLS = [Tool("function", Function("f", parameters={"type": "object"})), Tool("function", Function("g", "does"))]
ANY_OBJECT = Constraint(Grammar(kind=GrammarKind.JSON_OBJECT), "response_format")


class Templated(ByteTokenizer):
    def __init__(self, template: str | None) -> None:
        self.tool_template = template  # type: ignore[assignment]


def plan(
    template: str | None, choice: Any, asked: Constraint | None = None, tools: list[Tool] = TOOLS, parser: str = "auto"
) -> ToolPlan:
    return ToolPlanner(Templated(template), parser).plan(tools, choice, asked, parallel=True)


def test_every_format_can_be_configured() -> None:
    assert set(TOOL_PARSERS) == {"auto", *FORMATS}


@pytest.mark.parametrize("choice", [None, "auto"])
def test_calls_are_read_in_the_models_own_format(choice: Any) -> None:
    found = plan(HERMES, choice)
    assert found.shown == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "g", "description": "does"}},
    ]
    assert found.constraint is None
    assert "<tool_call>" in found.markers


def test_what_is_not_to_be_called_is_not_shown() -> None:
    assert plan(None, "none", ANY_OBJECT) == ToolPlan(constraint=ANY_OBJECT)
    assert plan(None, None, tools=[]) == ToolPlan()


def test_a_configured_parser_goes_before_what_the_template_shows() -> None:
    assert plan(HERMES, None, parser="mistral").id_length == 9


def test_only_calls_that_nothing_binds_may_break_off_a_thought() -> None:
    coder = "{{ tools }}<function=<parameter="
    assert plan(coder, "auto").opening == ("<tool_call>", "<function=")
    assert plan(coder, "required").opening is plan(HERMES, "auto").opening is None


@pytest.mark.parametrize(("template", "reason"), [(None, "does not show tools"), ("{{ tools }}", "server.tool_parser")])
def test_tools_that_would_come_to_nothing_are_refused(template: str | None, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        plan(template, None)


@pytest.mark.parametrize(
    ("template", "kind"),
    [(HERMES, GrammarKind.GRAMMAR), (None, GrammarKind.JSON_SCHEMA), ("[TOOL_CALLS]", "json_schema")],
)
@pytest.mark.parametrize("choice", ["required", NamedTool("function", FunctionChoice("f"))])
@pytest.mark.parametrize("asked", [None, ANY_OBJECT])
def test_calls_that_must_be_are_bound_whatever_text_should_be(
    template: str | None, kind: str, choice: Any, asked: Constraint | None
) -> None:
    constraint = plan(template, choice, asked).constraint
    assert constraint is not None
    assert (constraint.grammar.kind, constraint.param) == (kind, "tools")


def test_calls_or_text_that_is_bound() -> None:
    constraint = plan(HERMES, "auto", ANY_OBJECT).constraint
    assert constraint is not None and "calls | answer" in constraint.grammar.text
    with pytest.raises(RequestError, match="tool_choice") as caught:
        plan("[TOOL_CALLS]", "auto", ANY_OBJECT)
    assert caught.value.param == "response_format"


def test_ids_are_as_templates_want_them() -> None:
    assert call_id(24).startswith("call_")
    assert len(call_id(9)) == 9 and call_id(9).isalnum()
    assert call_id(9) != call_id(9)
