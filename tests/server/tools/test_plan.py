import json
from typing import Any

import pytest

from flowkv.config import TOOL_PARSERS
from flowkv.errors import RequestError
from flowkv.server.tool_body import Function, FunctionChoice, NamedTool, Tool
from flowkv.server.tools.formats import FORMATS
from flowkv.server.tools.plan import ToolPlanner, required_schema
from flowkv.server.tools.reader import call_id

HERMES = "{{ tools }}<tool_call>"
TOOLS = [Tool("function", Function("f", parameters={"type": "object"})), Tool("function", Function("g", "does"))]


def named(name: str) -> NamedTool:
    return NamedTool("function", FunctionChoice(name))


def test_every_format_can_be_configured() -> None:
    assert set(TOOL_PARSERS) == {"auto", *FORMATS}


@pytest.mark.parametrize("choice", [None, "auto"])
def test_calls_are_read_in_the_models_own_format(choice: Any) -> None:
    plan = ToolPlanner(HERMES, "auto").plan(TOOLS, choice, parallel=True)
    assert plan.shown == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "g", "description": "does"}},
    ]
    assert plan.constraint is None
    assert "<tool_call>" in plan.markers


def test_what_is_not_to_be_called_is_not_shown() -> None:
    planner = ToolPlanner(None, "auto")
    assert planner.plan(TOOLS, "none", parallel=True).shown is None
    assert planner.plan([], None, parallel=True).shown is None


def test_a_configured_parser_goes_before_what_the_template_shows() -> None:
    assert ToolPlanner(HERMES, "mistral").plan(TOOLS, None, parallel=True).id_length == 9


@pytest.mark.parametrize(("template", "reason"), [(None, "does not show tools"), ("{{ tools }}", "server.tool_parser")])
def test_tools_that_would_come_to_nothing_are_refused(template: str | None, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        ToolPlanner(template, "auto").plan(TOOLS, None, parallel=True)


def test_a_named_function_is_bound_by_its_parameters() -> None:
    plan = ToolPlanner(None, "auto").plan(TOOLS, named("f"), parallel=True)
    assert plan.constraint is not None
    assert json.loads(plan.constraint.grammar.text) == {"type": "object"}
    without = ToolPlanner(None, "auto").plan(TOOLS, named("g"), parallel=True)
    assert without.constraint is not None
    assert json.loads(without.constraint.grammar.text)["additionalProperties"] is False


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_bound_by_the_schemas_of_all(parallel: bool) -> None:
    plan = ToolPlanner(None, "auto").plan(TOOLS, "required", parallel=parallel)
    assert plan.constraint is not None
    schema = json.loads(plan.constraint.grammar.text)
    assert schema["minItems"] == 1
    assert schema.get("maxItems") == (None if parallel else 1)
    assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["f", "g"]


def test_definitions_move_to_where_references_look() -> None:
    point = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "null"}}}
    schema = required_schema({"f": point, "g": point}, parallel=True)
    assert schema["$defs"] == {"P": {"type": "null"}}
    assert "$defs" not in schema["items"]["anyOf"][0]["properties"]["parameters"]
    with pytest.raises(RequestError, match="'P' differently"):
        required_schema({"f": point, "g": {"$defs": {"P": {}}}}, parallel=True)


def test_ids_are_as_templates_want_them() -> None:
    assert call_id(24).startswith("call_")
    assert len(call_id(9)) == 9 and call_id(9).isalnum()
    assert call_id(9) != call_id(9)
