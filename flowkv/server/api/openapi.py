"""`GET /openapi.json`: what the endpoints say of themselves, in OpenAPI 3.1. Nothing in it is written by hand twice."""

import re
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flowkv.server.api.endpoint import Endpoint, json_response
from flowkv.server.error_answer import ErrorAnswer

ANYWHERE = (400, 401, 403)  # the gate answers before any route does
REASONS = {
    400: "The request is not one that can be answered; `param` names the field",
    401: "No key, or one that is not known",
    403: "A host or an origin that may not call, or a page that is shut",
    404: "No such model, or no such thing",
    408: "The client was too slow to send its body, or to read",
    413: "The body is too large",
    429: "Too much is asked for; try again after `Retry-After`",
    500: "The request failed",
    503: "Not now; try again after `Retry-After`",
}
_PARAMETER = re.compile(r"{(\w+)(:\w+)?}")
_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_-][A-Za-z0-9._-]*$"}
_NUMBER = {"type": "integer", "minimum": 0, "maximum": 10**9 - 1}
_REQUEST_ID = {"schema": {"type": "string"}, "description": "The client's own, or one that was made"}
_RETRY_AFTER = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds"}


class OpenApi:
    """The document of these endpoints, and the endpoint that shows it, which is among them."""

    def __init__(self, endpoints: list[Endpoint], version: str) -> None:
        self.endpoint = Endpoint(
            path="/openapi.json", handler=self.show, answer=dict[str, Any], summary="This document"
        )  # fmt: skip
        self._document = document([*endpoints, self.endpoint], version)

    async def show(self, request: Request) -> Response:
        return json_response(self._document)


def document(endpoints: list[Endpoint], version: str) -> dict[str, Any]:
    types = [ErrorAnswer, *_types(endpoints)]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for one in types:
        for name in getattr(one, "unsupported", ()):  # known, so that it can be refused
            components[one.__name__]["properties"].pop(name, None)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operations = paths.setdefault(_PARAMETER.sub(r"{\1}", endpoint.path), {})
        operations[endpoint.method.lower()] = _operation(endpoint, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "FlowKV", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _types(endpoints: list[Endpoint]) -> list[Any]:
    found = [
        one
        for endpoint in endpoints
        for one in (endpoint.body, endpoint.answer, *(answer for _, answer in endpoint.others))
        if one is not None
    ]
    return list(dict.fromkeys(found))


def _operation(endpoint: Endpoint, schema_of: dict[Any, Any]) -> dict[str, Any]:
    words = _PARAMETER.sub(r"\1", f"{endpoint.method.lower()}{endpoint.path}")
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", words),
        "summary": endpoint.summary,
        "parameters": _parameters(endpoint),
        "responses": {"200": _answer(endpoint, schema_of)},
    }
    if endpoint.body is not None:
        content = {"application/json": {"schema": schema_of[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    for status, answer in endpoint.others:
        operation["responses"][str(status)] = _other(status, schema_of[answer], {})
    for status in sorted({*endpoint.errors, *ANYWHERE}):
        headers = {"Retry-After": _RETRY_AFTER} if status in (429, 503) else {}
        operation["responses"][str(status)] = _other(status, schema_of[ErrorAnswer], headers)
    return operation


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    in_path = [
        {"name": match[1], "in": "path", "required": True, "schema": _NAME}
        for match in _PARAMETER.finditer(endpoint.path)
    ]
    return in_path + [{"name": name, "in": "query", "schema": _NUMBER} for name in endpoint.query]


def _answer(endpoint: Endpoint, schema_of: dict[Any, Any]) -> dict[str, Any]:
    media_type = endpoint.media_type.partition(";")[0]
    schema = {} if endpoint.answer is None else schema_of[endpoint.answer]
    content = {media_type: {"schema": schema if media_type == "application/json" else {"type": "string"}}}
    if endpoint.is_streamed:
        content["text/event-stream"] = {"schema": {"description": "Where `stream` is true"}}
    return {"description": endpoint.summary, "headers": {"X-Request-Id": _REQUEST_ID}, "content": content}


def _other(status: int, schema: dict[str, Any], headers: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": REASONS[status],
        "headers": {"X-Request-Id": _REQUEST_ID, **headers},
        "content": {"application/json": {"schema": schema}},
    }
