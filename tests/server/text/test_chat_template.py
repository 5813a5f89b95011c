from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from flowkv.errors import RequestError
from flowkv.server.text.chat_template import ChatTemplate, Conversation

USER = [{"role": "user", "content": "hi"}]
# What the templates of models with tools are made of.
TOOLS_TEMPLATE = (
    "{{- bos_token }}{%- if tools %}<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}[{{ message.tool_call_id }}={{ message.content }}]"
    "{%- elif message.tool_calls is defined and message.tool_calls %}{% if message['content'] is not none %}"
    "{{ message.content }}{% endif %}{% for call in message.tool_calls %}{% set call = call.function %}"
    '<tool_call>{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson(indent=2) }}}</tool_call>'
    "{% endfor %}{% else %}<{{ message.role }}>{{ message.content }}{{ message.reasoning_content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ thinking }}"
)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "f", "description": "<b> é", "parameters": {"type": "object", "properties": {"x": {}}}},
    }
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "2"},
    {"role": "assistant", "content": "so ", "reasoning_content": "hm", "thinking": "hm"},
]


def as_transformers(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    render: Any = render_jinja_template
    (text,), _ = render([messages], chat_template=source, **options)
    return str(text)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_what_is_rendered_is_what_transformers_renders(
    tools: list[dict[str, Any]] | None, add_generation_prompt: bool
) -> None:
    expected = as_transformers(
        TOOLS_TEMPLATE,
        MESSAGES,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        thinking=True,
    )
    conversation = Conversation(MESSAGES, tools, add_generation_prompt, False, {"thinking": True})
    template = ChatTemplate(TOOLS_TEMPLATE, {"bos_token": "<s>"})
    assert template.render(conversation) == expected
    assert template.takes_tools


@pytest.mark.parametrize("source", ["{{ messages[-1].content }}<end>", "{{ messages[-1].content | trim }}<end>"])
@pytest.mark.parametrize("content", ["One, two ", "One", " x"])
def test_a_message_that_goes_on_ends_as_with_transformers(source: str, content: str) -> None:
    messages = [*USER, {"role": "assistant", "content": content}]
    expected = as_transformers(source, messages, continue_final_message=True)
    conversation = Conversation(messages, add_generation_prompt=False, continue_final_message=True)
    assert ChatTemplate(source, {}).render(conversation) == expected


def test_a_message_that_is_not_shown_cannot_go_on() -> None:
    with pytest.raises(RequestError, match="final message"):
        ChatTemplate("x", {}).render(Conversation(USER, continue_final_message=True))


def test_templates_have_what_transformers_gives_them() -> None:
    source = (
        "{%- set found = namespace(n=0) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% set found.n = found.n + 1 %}{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
        "{{ found.n }}{{ tools is none }}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": content} for content in ("<é>", "b", "c")]
    assert ChatTemplate(source, {}).render(Conversation(messages)) == '"<é>""b"2True4'


def test_templates_cannot_leave_the_sandbox() -> None:
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ messages.clear() }}",
    ):
        with pytest.raises(RequestError):
            ChatTemplate(source, {}).render(Conversation(USER))


def test_a_template_that_goes_too_deep_into_what_it_gets_does_not_take_it() -> None:
    template = ChatTemplate("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", {})
    with pytest.raises(RequestError, match="does not take these messages"):
        template.render(Conversation([{"role": "user", "content": "x"}]))
