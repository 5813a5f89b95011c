"""A route and what there is to say of it: one table makes both the application and its OpenAPI document."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

BODY_ERRORS = (400, 404, 408, 413, 429, 503)  # of routes that take a body: the model, its size, limits, the cluster
GENERATION_ERRORS = (*BODY_ERRORS, 500)

Handler = Callable[[Request], Awaitable[ASGIApp]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`path` as Starlette takes it; `body` and `answer` (of a 200) are the structs of their JSON."""

    path: str
    handler: Handler
    summary: str
    method: str = "GET"
    body: type[msgspec.Struct] | None = None
    answer: Any = None
    others: tuple[tuple[int, Any], ...] = ()  # other statuses with answers that are no errors
    errors: tuple[int, ...] = ()  # besides those that any route may answer with
    query: tuple[str, ...] = ()  # names of numbers that may stand behind a `?`
    is_streamed: bool = False  # server-sent events, where the body asks for it
    media_type: str = "application/json"

    def route(self) -> Route:
        return Route(self.path, self.handler, methods=[self.method])


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
