"""What every route that takes or makes text needs: bodies read, prompts tokenized, requests submitted."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from flowkv import types
from flowkv.config import ServerConfig
from flowkv.errors import RequestError
from flowkv.server.access.request_id import request_id_of
from flowkv.server.answers.envelope import Head, ResponseFormat
from flowkv.server.answers.generation import GenerationResponse
from flowkv.server.answers.meter import TokenMeter
from flowkv.server.api.grammar_check import GrammarCheck
from flowkv.server.api.parameters import Binding, build_request
from flowkv.server.bodies.generation import GenerationBody
from flowkv.server.bodies.structured import Constraint
from flowkv.server.frontend import Frontend
from flowkv.server.live_request import TextOptions
from flowkv.server.reasoning.counter import NewCounter
from flowkv.server.reasoning.plan import ReasoningPlanner
from flowkv.server.tools.plan import ToolPlanner

INLINE_SIZE = 16384  # longer texts are tokenized in a thread, so that they do not hold up every open stream

T = TypeVar("T")


class TextService:
    def __init__(self, frontend: Frontend, model_name: str, config: ServerConfig) -> None:
        """`model_name` is what clients may call the one model that is served."""
        self.frontend = frontend
        self.tokenizer = frontend.tokenizer
        self.model_name = model_name
        self.tool_planner = ToolPlanner(self.tokenizer, config.tool_parser)
        self.reasoning_planner = ReasoningPlanner(self.tokenizer, config.reasoning_parser)
        self._grammar_check = GrammarCheck(self.tokenizer)
        self._max_body_bytes = config.max_body_bytes

    async def read(self, request: Request) -> bytes:
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

    def check_model(self, name: str | None) -> None:
        if name and name != self.model_name:
            reason = f"the model {name!r} does not exist; this server has {self.model_name!r}"
            raise RequestError(reason, status=404, param="model", code="model_not_found")

    def head(self, prefix: str, request: Request) -> Head:
        return Head(prefix + request_id_of(request).unique(), int(time.time()), self.model_name)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return await self.off_loop(
            len(text), lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def encode_all(self, prompts: list[str | list[int]]) -> list[list[int]]:
        """Of one body, which may hold many short ones; those that are ids already stay what they are."""
        num_chars = sum(len(part) for part in prompts if isinstance(part, str))
        return await self.off_loop(
            num_chars, lambda: [self.tokenizer.encode(part) if isinstance(part, str) else part for part in prompts]
        )

    async def decode_all(self, prompts: list[str | list[int]]) -> list[str]:
        num_ids = sum(len(part) for part in prompts if not isinstance(part, str))
        return await self.off_loop(
            num_ids, lambda: [part if isinstance(part, str) else self.tokenizer.decode(part) for part in prompts]
        )

    async def off_loop(self, size: int, work: Callable[[], T]) -> T:
        """`size`: of all of it together, in characters or tokens."""
        return work() if size <= INLINE_SIZE else await asyncio.to_thread(work)

    async def binding(self, constraint: Constraint | None) -> Binding:
        """Raises `RequestError` (400) where no output can follow it."""
        if constraint is None:
            return Binding()
        return Binding(constraint.grammar, await self._grammar_check.check(constraint.grammar, constraint.param))

    def requests(
        self, head: Head, body: GenerationBody, prompts: list[list[int]], binding: Binding
    ) -> list[types.Request]:
        """One for each prompt's ids. Raises `RequestError` for what this cluster cannot do."""
        limits = self.frontend.limits()
        eos_ids = self.tokenizer.eos_token_ids
        return [
            build_request(f"{head.response_id}-{number}", body, prompt_ids, limits, eos_ids, binding)
            for number, prompt_ids in enumerate(prompts)
        ]

    def respond(
        self,
        body: GenerationBody,
        requests: list[types.Request],
        shape: ResponseFormat,
        arrival_s: float,
        kept_tokens: tuple[str, ...] = (),
        new_counter: NewCounter | None = None,
    ) -> GenerationResponse:
        """`kept_tokens`: special ones that show in the text whatever the client says; `new_counter`: of thoughts."""
        options = TextOptions(
            body.stop_strings,
            bool(body.include_stop_str_in_output),
            body.skip_special_tokens is not False,
            kept_tokens,
        )
        return GenerationResponse(
            self.frontend.submit(requests, options, arrival_s),
            shape,
            TokenMeter(sum(len(request.prompt_ids) for request in requests), new_counter),
            len(requests) * body.num_choices,
            streamed=bool(body.stream),
        )
