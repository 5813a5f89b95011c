"""A model whose template opens a thought, through real processes: prefill here, decode there."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from flowkv.bundled import MODEL_FOLDER
from tests.e2e.server import Server, serving

RENAMED = {"<|system|>": "<think>", "<|user|>": "</think>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}\n{% endfor %}<|assistant|>\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
USER: Any = [{"role": "user", "content": "The quality of mercy"}]
SCHEMA = {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"], "additionalProperties": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, two of whose special tokens have become marks of a thought."""
    folder = tmp_path_factory.mktemp("model") / "thinking"
    shutil.copytree(MODEL_FOLDER, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for old, new in RENAMED.items():
            text = text.replace(old, new)
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    pair = ("--prefill", "1", "--decode", "1", "--roles", "fixed", "--set", "engine.check_integrity=true")
    with serving(str(folder), "--threads", "1", *pair) as server:
        yield server


def ask(server: Server, *, close: float, **fields: Any) -> Any:
    """`close` is added to the logit of the token that ends a thought."""
    body = {"messages": USER, "seed": 5, "max_tokens": 64, "logit_bias": {"3": close}, **fields}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60.0, max_retries=0) as client:
        return client.chat.completions.create(model="thinking", extra_body=body, messages=USER)


def test_a_thought_and_then_an_answer_that_follows_its_schema(server: Server) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    answers = [ask(server, close=10.0, seed=seed, max_tokens=300, response_format=response_format) for seed in range(4)]
    for answer in answers:
        (choice,) = answer.choices
        assert json.loads(choice.message.content)["x"] in ("a", "b")
        assert choice.finish_reason == "stop"
        usage = answer.usage
        assert 1 <= usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert any(answer.choices[0].message.reasoning_content for answer in answers)


def test_a_thought_that_does_not_end(server: Server) -> None:
    answer = ask(server, close=-100.0)
    (choice,) = answer.choices
    assert choice.message.content is None and choice.message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens == 64


def test_a_prompt_that_has_closed_the_thought(server: Server) -> None:
    (choice,) = ask(server, close=-100.0, chat_template_kwargs={"enable_thinking": False}).choices
    assert choice.message.content and choice.message.reasoning_content is None
