"""The HTTP side: OpenAI's routes and those that operators look at, as a Starlette application."""

import logging
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from flowkv import __version__
from flowkv.config import ServerConfig
from flowkv.errors import RequestError
from flowkv.server.access.request_id import request_id_of
from flowkv.server.access.trace_context import TraceContext
from flowkv.server.api import unsupported
from flowkv.server.api.admin import AdminApi
from flowkv.server.api.chat import ChatApi
from flowkv.server.api.completions import CompletionsApi
from flowkv.server.api.dashboard import Dashboard
from flowkv.server.api.endpoint import Endpoint
from flowkv.server.api.openapi import OpenApi
from flowkv.server.api.requests import RequestsApi
from flowkv.server.api.responses import ResponsesApi
from flowkv.server.api.status import StatusApi
from flowkv.server.api.text_service import TextService
from flowkv.server.api.tokens import TokensApi
from flowkv.server.error_answer import error_body, retry_headers
from flowkv.server.frontend import Frontend

_HTTP_ERRORS = {404: "not_found", 405: "method_not_allowed"}  # as they are counted

_logger = logging.getLogger(__name__)


def create_app(frontend: Frontend, model_name: str, config: ServerConfig) -> Starlette:
    """`model_name` is what clients may call the one model that is served."""
    service = TextService(frontend, model_name, config)
    endpoints: list[Endpoint] = [
        *CompletionsApi(service).endpoints(),
        *ChatApi(service).endpoints(),
        *ResponsesApi(service).endpoints(),
        *TokensApi(service).endpoints(),
        *StatusApi(service).endpoints(),
        *AdminApi(frontend, config.drain_timeout_s).endpoints(),
        *Dashboard(service).endpoints(),
        *RequestsApi(frontend).endpoints(),
    ]
    endpoints.append(OpenApi(endpoints, __version__).endpoint)
    routes = [
        *(endpoint.route() for endpoint in endpoints),
        *unsupported.routes(),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TraceContext)],
        exception_handlers=ErrorAnswers(frontend.count_refused).handlers(),
    )


class ErrorAnswers:
    """Every failure in OpenAI's shape."""

    def __init__(self, count_refused: Callable[[int, str], None]) -> None:
        self._count_refused = count_refused

    def handlers(self) -> dict[Any, Callable[..., Any]]:
        return {
            RequestError: self.on_request_error,
            HTTPException: self.on_http_error,
            ClientDisconnect: self.on_disconnect,
            Exception: self.on_bug,
        }

    async def on_request_error(self, request: Request, error: RequestError) -> Response:
        code = error.code or "invalid_request"
        self._count_refused(error.status, code)
        _logger.info(
            "answered %d (%s) to %s %s", error.status, code, request.method, request.url.path,
            extra={"request_id": request_id_of(request).text, "fields": {"status": error.status, "error": code}},
        )  # fmt: skip
        return Response(error_body(error), error.status, retry_headers(error), "application/json")

    async def on_http_error(self, request: Request, error: HTTPException) -> Response:
        reason = f"{request.method} {request.url.path}: {error.detail}"
        self._count_refused(error.status_code, _HTTP_ERRORS.get(error.status_code, "invalid_request"))
        body = error_body(RequestError(reason, status=error.status_code))
        return Response(body, error.status_code, error.headers, "application/json")

    async def on_disconnect(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def on_bug(self, request: Request, error: Exception) -> Response:
        self._count_refused(500, "internal_error")
        body = error_body(RequestError("internal error", status=500, code="internal_error"))
        return Response(body, 500, media_type="application/json")
