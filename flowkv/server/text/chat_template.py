"""Chat templates as model folders carry them, rendered as `transformers` renders them.

Source of the environment: `transformers.utils.chat_template_utils` (5.23), less the tracking of assistant spans.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Never

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flowkv.errors import ModelError, RequestError

_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is rendered: messages and tools as plain JSON values, and variables besides."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the text ends where the last message does, so that it goes on
    variables: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` (`bos_token`, ...) are variables of the template; raises `ModelError` if it is none."""
        environment = _environment()
        try:
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template does not parse: {error}") from error
        self.source = source
        self.takes_tools = "tools" in variables
        self._special_tokens = dict(special_tokens)

    def render(self, conversation: Conversation) -> str:
        """The conversation as text, ending where the assistant begins, or goes on.

        Raises `RequestError` with the template's own words where it does not take these messages.
        """
        if not conversation.continue_final_message:
            return self._render(conversation, conversation.messages)
        *messages, last = conversation.messages
        content = last["content"] or ""
        text = self._render(conversation, [*messages, {**last, "content": content + _CONTINUED}])
        end = text.rfind(_CONTINUED.strip())
        if end < 0 or content.strip() not in text:
            reason = "the model's chat template does not show the final message, so it cannot go on"
            raise RequestError(reason, param="continue_final_message")
        # A template that trims what it shows has trimmed the message's own end too.
        return text[:end] if text.startswith(_CONTINUED, end) else text[:end].rstrip()

    def _render(self, conversation: Conversation, messages: list[dict[str, Any]]) -> str:
        variables = {
            **self._special_tokens,
            **conversation.variables,
            "messages": messages,
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": conversation.add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            reason = f"the model's chat template does not take these messages: {error}"
            raise RequestError(reason, param="messages") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here it only stands for its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Without underscored names, which would open a way to CPython's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set the attribute {name!r}")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which templates do not expect.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
