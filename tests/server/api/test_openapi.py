"""The document is true: what is answered is what it says, and what it does not allow is refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from flowkv.errors import RequestError
from flowkv.server.api.endpoint import Endpoint
from flowkv.server.api.openapi import document as document_of
from flowkv.server.bodies.chat import ChatBody, decode_chat
from flowkv.server.bodies.completions import CompletionBody, decode_completion
from flowkv.server.bodies.responses import ResponsesBody, decode_responses
from flowkv.types import FinishReason, Output
from tests.server.bodies.test_generation import BAD_CHAT, BAD_COMPLETION, BAD_FIELDS
from tests.server.conftest import Served
from tests.server.fake_cluster import say, status

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.fixture
def document(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = served.client.get("/openapi.json").json()
    return found


def validator(document: dict[str, Any], schema: Any) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def check_answer(document: dict[str, Any], path: str, method: str, response: Any) -> None:
    """The status, the type and the body of an answer are in the document."""
    answers = document["paths"][path][method]["responses"]
    assert str(response.status_code) in answers
    answer = answers[str(response.status_code)]
    assert {name.lower() for name in answer["headers"]} <= set(response.headers)
    media_type = response.headers["content-type"].partition(";")[0]
    schema = (answer["content"].get(media_type) or answer["content"]["*/*"])["schema"]
    if media_type == "application/json":
        validator(document, schema).validate(response.json())
    else:
        validator(document, schema).validate(response.text)


POSTS: list[tuple[str, Any, int]] = [
    ("/v1/completions", {"prompt": "hi"}, 200),
    ("/v1/completions", {"prompt": "hi", "logprobs": 2, "echo": True, "n": 2, "return_token_ids": True}, 200),
    ("/v1/completions", {"prompt": "hi", "stream": True}, 200),
    ("/v1/completions", {"prompt": ""}, 400),
    ("/v1/completions", {"prompt": "hi", "model": "other"}, 404),
    ("/v1/completions", {"prompt": "x" * 200_000}, 413),
    ("/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}, 200),
    ("/v1/chat/completions", {"messages": USER, "tools": TOOLS}, 200),
    ("/v1/chat/completions", {"messages": USER, "stream": True}, 200),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/responses", {"input": "hi"}, 200),
    ("/v1/responses", {"input": "hi", "tools": [{"type": "function", "name": "f"}], "metadata": {"a": "b"}}, 200),
    ("/v1/responses", {"input": "hi", "stream": True}, 200),
    ("/v1/responses", {"input": []}, 400),
    ("/tokenize", {"prompt": "hi", "return_token_strs": True}, 200),
    ("/tokenize", {}, 400),
    ("/detokenize", {"tokens": [65]}, 200),
    ("/detokenize", {"tokens": "x"}, 400),
]


@pytest.mark.parametrize(("path", "body", "code"), POSTS)
def test_answers_are_what_the_document_says(
    served: Served, document: dict[str, Any], path: str, body: Any, code: int
) -> None:
    served.cluster.answer = say(CALL)
    response = served.client.post(path, json=body)
    assert response.status_code == code
    check_answer(document, path, "post", response)
    if code == 200:
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        validator(document, content["schema"]).validate(body)


def test_every_page_is_what_the_document_says(served: Served, document: dict[str, Any]) -> None:
    served.client.post("/v1/completions", json={"prompt": "hi"})
    for path, operations in document["paths"].items():
        if "get" not in operations:
            continue
        for name in ("toy", "style.css", "other"):
            response = served.client.get(path.replace("{model}", name).replace("{name}", name))
            check_answer(document, path, "get", response)
        for parameter in operations["get"]["parameters"]:
            if parameter["in"] == "query":
                check_answer(document, path, "get", served.client.get(f"{path}?{parameter['name']}=1"))
                check_answer(document, path, "get", served.client.get(f"{path}?{parameter['name']}=x"))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_failures_are_what_the_document_says(served: Served, document: dict[str, Any], path: str) -> None:
    body = {"prompt": "hi"} if path in ("/v1/completions", "/tokenize") else {"messages": USER, "input": "hi"}
    if path != "/tokenize":
        served.cluster.answer = lambda request: [
            Output(request.request_id, 0, 0, [], FinishReason.ERROR, error="d0.1 died")
        ]
        check_answer(document, path, "post", served.client.post(path, json=body))
    served.cluster.status = status(ready=False)
    while served.client.get("/ready").status_code == 200:
        pass
    response = served.client.post(path, json=body)
    assert response.status_code == 503
    check_answer(document, path, "post", response)
    check_answer(document, "/ready", "get", served.client.get("/ready"))


def test_every_schema_is_one(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert "$ref" not in schema, name
    references = set(_references(document))
    assert references == {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def test_what_is_always_refused_is_not_offered(document: dict[str, Any]) -> None:
    assert "suffix" not in document["components"]["schemas"]["CompletionBody"]["properties"]
    assert "previous_response_id" not in document["components"]["schemas"]["ResponsesBody"]["properties"]


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for inner in value.values() for found in _references(inner)]
    return [found for inner in value for found in _references(inner)] if isinstance(value, list) else []


DECODERS: dict[str, Any] = {
    "CompletionBody": ({"prompt": "hi"}, decode_completion, BAD_FIELDS + BAD_COMPLETION),
    "ChatBody": ({"messages": USER}, decode_chat, BAD_FIELDS + BAD_CHAT),
    "ResponsesBody": ({"input": "hi"}, decode_responses, [("input", 5), ("temperature", 3), ("tools", [{}])]),
}
ENDPOINTS = [
    Endpoint(path=f"/{body.__name__}", method="POST", handler=lambda _: 1 / 0, summary="", body=body)  # type: ignore[arg-type,return-value]
    for body in (CompletionBody, ChatBody, ResponsesBody)
]
COMPONENTS = document_of(ENDPOINTS, "1")["components"]
BODIES = COMPONENTS["schemas"]
VALIDATORS = {name: Draft202012Validator({**BODIES[name], "components": COMPONENTS}) for name in DECODERS}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.sampled_from(["", "a", "text", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "name", "1"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(st.data())
def test_what_the_schema_does_not_allow_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(DECODERS)))
    good, decode, bad_fields = DECODERS[name]
    field = data.draw(st.sampled_from(sorted(BODIES[name]["properties"])))
    value = data.draw(json_values | st.sampled_from([bad for known, bad in bad_fields if known == field] or [None]))
    body = {**good, field: value}
    text = json.dumps(body)
    try:
        decode(text.encode())
    except RequestError as error:
        assert error.status == 400
    else:
        assert VALIDATORS[name].is_valid(json.loads(text))
