"""Answers that follow a grammar and tokens that are biased, through real processes: prefill here, decode there."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.server import Server, eventually, serving

PAIR = ("--prefill", "1", "--decode", "1", "--roles", "fixed", "--set", "engine.check_integrity=true")
STANDARD = ("max_tokens", "temperature", "n", "logit_bias")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["toy", "bundled"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    which = ("--toy",) if request.param == "toy" else ("--threads", "1")
    with serving(*which, *PAIR) as server:
        yield server


def complete(server: Server, **options: Any) -> list[openai.types.CompletionChoice]:
    extra = {name: options.pop(name) for name in list(options) if name not in STANDARD}
    chosen: dict[str, Any] = {"max_tokens": 300, "temperature": 1.0, "seed": 3} | options
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120.0, max_retries=0) as client:
        model = client.models.list().data[0].id
        answer: openai.types.Completion = client.completions.create(
            model=model, prompt="A person:", extra_body=extra, **chosen
        )
        return answer.choices


def test_every_choice_follows_its_schema(server: Server) -> None:
    transfers = "flowkv_instance_transfers_total"
    before = server.gauge(transfers)["prefill-0"]
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    choices = complete(server, n=3, response_format=schema)
    for choice in choices:
        jsonschema.validate(json.loads(choice.text), PERSON)
        assert choice.finish_reason == "stop"
    assert len({choice.text for choice in choices}) > 1
    assert choices == complete(server, n=3, response_format=schema)  # by their seed
    eventually(lambda: server.gauge(transfers)["prefill-0"] >= before + 2, "both were handed over")


@pytest.mark.parametrize(
    ("structured_outputs", "texts"),
    [
        ({"choice": ["yes", "no, never"]}, {"yes", "no, never"}),
        ({"regex": "(ab){3}"}, {"ababab"}),
        ({"grammar": 'root ::= "<" ("x" | "y") ">"'}, {"<x>", "<y>"}),
        ({"grammar": 'start: "call " %json {"const": 17}'}, {"call 17"}),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_grammars(
    server: Server, structured_outputs: dict[str, Any], texts: set[str], temperature: float
) -> None:
    [choice] = complete(server, structured_outputs=structured_outputs, temperature=temperature)
    assert choice.text in texts
    assert choice.finish_reason == "stop"


def test_a_grammar_ends_an_answer_that_ignores_the_end(server: Server) -> None:
    [choice] = complete(server, structured_outputs={"regex": "a{9}"}, ignore_eos=True, min_tokens=20)
    assert choice.text == "aaaaaaaaa" and choice.finish_reason == "stop"


def test_a_schema_that_cannot_be_is_refused_with_its_field(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="Unimplemented") as caught:
        complete(server, structured_outputs={"json": {"not": {}}})
    assert caught.value.param == "structured_outputs"


def test_biases_ban_and_choose(server: Server) -> None:
    [choice] = complete(server, max_tokens=1, temperature=0.0, return_token_ids=True)
    [best] = choice.token_ids  # type: ignore[attr-defined]
    for temperature in (0.0, 1.0):
        biased = {"max_tokens": 6, "temperature": temperature, "return_token_ids": True}
        [chosen] = complete(server, logit_bias={str(best): 100}, **biased)
        [banned] = complete(server, logit_bias={str(best): -100}, **biased)
        assert chosen.token_ids == [best] * 6  # type: ignore[attr-defined]
        assert best not in banned.token_ids  # type: ignore[attr-defined]
