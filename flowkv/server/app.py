"""The HTTP side: OpenAI's routes and those that operators look at, as a Starlette application."""

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from flowkv import types
from flowkv.config import ServerConfig
from flowkv.errors import RequestError
from flowkv.server.frontend import Frontend, TextOptions
from flowkv.server.generation import GenerationResponse
from flowkv.server.parameters import build_request
from flowkv.server.protocol import MAX_CHOICES, ChatBody, CompletionBody, decode_chat, decode_completion
from flowkv.server.response import ChatFormat, CompletionFormat, Echo, Head, ResponseFormat, Usage, error_body

INLINE_TEXT_CHARS = 16384  # longer texts are tokenized in a thread, so that they do not hold up every open stream


def create_app(frontend: Frontend, model_name: str, config: ServerConfig) -> Starlette:
    """`model_name` is what clients may call the one model that is served."""
    api = Api(frontend, model_name, config)
    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/metrics", api.metrics),
        Route("/cluster", api.cluster),
        Route("/version", api.version),
    ]
    handlers: dict[Any, Callable[..., Any]] = {
        RequestError: api.on_request_error,
        HTTPException: api.on_http_error,
        ClientDisconnect: api.on_disconnect,
        Exception: api.on_bug,
    }
    return Starlette(routes=routes, exception_handlers=handlers)


class Api:
    def __init__(self, frontend: Frontend, model_name: str, config: ServerConfig) -> None:
        self._frontend = frontend
        self._tokenizer = frontend.tokenizer
        self._model_name = model_name
        self._max_body_bytes = config.max_body_bytes
        self._created = int(time.time())

    # --- generation ----------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> GenerationResponse:
        arrival_s = self._frontend.now_s()
        body = decode_completion(await self._read(request))
        self._check_model(body.model)
        prompts = body.prompts()
        if len(prompts) * body.num_choices > MAX_CHOICES:
            raise RequestError(f"the prompts times n are more than {MAX_CHOICES} choices", param="prompt")
        self._frontend.limits()  # nothing is tokenized for a cluster that is not there
        prompt_ids = [await self._encode(part) if isinstance(part, str) else part for part in prompts]
        head = self._head("cmpl-")
        requests = self._requests(head, body, prompt_ids)
        echoes = [self._echo(part, ids) for part, ids in zip(prompts, prompt_ids, strict=True)] if body.echo else []
        shape = CompletionFormat(
            head,
            self._tokenizer,
            n=body.num_choices,
            logprobs=body.logprobs is not None,
            echoes=echoes,
            with_usage=body.include_usage,
        )
        return self._respond(body, requests, shape, arrival_s)

    async def chat(self, request: Request) -> GenerationResponse:
        arrival_s = self._frontend.now_s()
        body = decode_chat(await self._read(request))
        self._check_model(body.model)
        self._frontend.limits()
        messages = [message.plain() for message in body.messages]
        num_chars = sum(len(message["content"]) for message in messages)
        prompt_ids = await self._off_loop(num_chars, lambda: self._tokenizer.encode_chat(messages))
        head = self._head("chatcmpl-")
        requests = self._requests(head, body, [prompt_ids])
        shape = ChatFormat(head, self._tokenizer, logprobs=bool(body.logprobs), with_usage=body.include_usage)
        return self._respond(body, requests, shape, arrival_s)

    def _requests(self, head: Head, body: CompletionBody | ChatBody, prompts: list[list[int]]) -> list[types.Request]:
        limits = self._frontend.limits()
        eos_ids = self._tokenizer.eos_token_ids
        return [
            build_request(f"{head.response_id}-{number}", body, prompt_ids, limits, eos_ids)
            for number, prompt_ids in enumerate(prompts)
        ]

    def _respond(
        self, body: CompletionBody | ChatBody, requests: list[types.Request], shape: ResponseFormat, arrival_s: float
    ) -> GenerationResponse:
        options = TextOptions(
            body.stop_strings, bool(body.include_stop_str_in_output), body.skip_special_tokens is not False
        )
        return GenerationResponse(
            self._frontend.submit(requests, options, arrival_s),
            shape,
            Usage(sum(len(request.prompt_ids) for request in requests)),
            len(requests) * body.num_choices,
            streamed=bool(body.stream),
            with_usage=body.include_usage,
        )

    def _check_model(self, name: str | None) -> None:
        if name and name != self._model_name:
            reason = f"the model {name!r} does not exist; this server has {self._model_name!r}"
            raise RequestError(reason, status=404, param="model", code="model_not_found")

    def _head(self, prefix: str) -> Head:
        return Head(prefix + uuid.uuid4().hex, int(time.time()), self._model_name)

    def _echo(self, prompt: str | list[int], prompt_ids: list[int]) -> Echo:
        return Echo(prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt), prompt_ids)

    async def _encode(self, text: str) -> list[int]:
        return await self._off_loop(len(text), lambda: self._tokenizer.encode(text))

    async def _off_loop(self, num_chars: int, encode: Callable[[], list[int]]) -> list[int]:
        return encode() if num_chars <= INLINE_TEXT_CHARS else await asyncio.to_thread(encode)

    async def _read(self, request: Request) -> bytes:
        """The body, of which no more than the limit is ever held. Raises `RequestError` (413) above it."""
        error = RequestError(
            f"the body is larger than {self._max_body_bytes} bytes", status=413, code="request_too_large"
        )
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise error
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self._max_body_bytes:
                raise error
        return bytes(data)

    # --- the rest --------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._model_card())

    async def health(self, request: Request) -> Response:
        """This process lives, whatever the cluster does."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        is_ready = self._frontend.is_ready
        return _json({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._frontend.metrics.render(), media_type="text/plain; version=0.0.4")

    async def cluster(self, request: Request) -> Response:
        """`ClusterView`."""
        return _json(self._frontend.view())

    async def version(self, request: Request) -> Response:
        return _json({"version": _version()})

    def _model_card(self) -> dict[str, Any]:
        status = self._frontend.status
        card = {"id": self._model_name, "object": "model", "created": self._created, "owned_by": "flowkv"}
        if status is None or status.model is None:
            return card
        return card | {"max_model_len": min(status.max_request_tokens, status.model.max_model_tokens)}

    # --- errors ----------------------------------------------------------------------------------------------------

    async def on_request_error(self, request: Request, error: RequestError) -> Response:
        self._frontend.metrics.count_refused(error.status)
        return Response(error_body(error), error.status, _retry_headers(error), "application/json")

    async def on_http_error(self, request: Request, error: HTTPException) -> Response:
        reason = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(RequestError(reason, status=error.status_code))
        return Response(body, error.status_code, error.headers, "application/json")

    async def on_disconnect(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def on_bug(self, request: Request, error: Exception) -> Response:
        body = error_body(RequestError("internal error", status=500, code="internal_error"))
        return Response(body, 500, media_type="application/json")


def _retry_headers(error: RequestError) -> dict[str, str] | None:
    """`Retry-After` is in whole seconds."""
    if error.status not in (429, 503):
        return None
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s or 0.0)))}


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _version() -> str:
    try:
        return version("flowkv")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
