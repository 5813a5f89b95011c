"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from flowkv.errors import RequestError
from flowkv.server.api.endpoint import BODY_ERRORS, Endpoint, json_response
from flowkv.server.api.text_service import TextService
from flowkv.server.bodies.chat import Messages, check_messages, check_template_use
from flowkv.server.bodies.generation import decode
from flowkv.server.bodies.tools import Tools
from flowkv.server.limits import Limits
from flowkv.server.text.chat_template import Conversation


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """A `prompt`, or else `messages`: special tokens are added to the one, and are the template's with the other."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None  # as the vocabulary has them


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[Annotated[int, Meta(ge=0)]]
    model: str | None = None


class Detokenized(msgspec.Struct):
    prompt: str


_tokenize_decoder = msgspec.json.Decoder(TokenizeBody)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeBody)


class TokensApi:
    def __init__(self, service: TextService) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                path="/tokenize", method="POST", handler=self.tokenize, body=TokenizeBody, answer=Tokenized,
                summary="Token ids of a prompt or a conversation", errors=BODY_ERRORS,
            ),
            Endpoint(
                path="/detokenize", method="POST", handler=self.detokenize, body=DetokenizeBody, answer=Detokenized,
                summary="Text of token ids, special tokens included", errors=BODY_ERRORS,
            ),
        ]  # fmt: skip

    async def tokenize(self, request: Request) -> Response:
        service = self._service
        data = await service.read(request)
        body = decode(_tokenize_decoder, data)
        service.check_model(body.model)
        limits = service.frontend.limits()
        token_ids = await self._ids(body, len(data))
        texts = None
        if body.return_token_strs:
            _check_length("prompt" if body.messages is None else "messages", len(token_ids), limits)
            texts = await service.off_loop(len(token_ids), lambda: list(map(service.tokenizer.token_piece, token_ids)))
        return json_response(Tokenized(len(token_ids), limits.max_request_tokens, token_ids, texts))

    async def detokenize(self, request: Request) -> Response:
        service = self._service
        body = decode(_detokenize_decoder, await service.read(request))
        service.check_model(body.model)
        limits = service.frontend.limits()
        _check_length("tokens", len(body.tokens), limits)
        limits.check_ids("tokens", body.tokens)
        return json_response(Detokenized((await service.decode_all([body.tokens]))[0]))

    async def _ids(self, body: TokenizeBody, num_chars: int) -> list[int]:
        service = self._service
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("either prompt or messages is needed, and not both", param="prompt")
        if body.prompt is not None:
            return await service.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        messages = body.messages or []
        check_messages(messages, "messages")
        check_template_use(body.add_generation_prompt, body.continue_final_message, body.chat_template_kwargs)

        def encode() -> list[int]:
            conversation = Conversation(
                [message.plain() for message in messages],
                [msgspec.to_builtins(tool) for tool in body.tools] if body.tools else None,
                body.add_generation_prompt is not False,
                bool(body.continue_final_message),
                body.chat_template_kwargs or {},
            )
            return service.tokenizer.encode_chat(conversation)

        return await service.off_loop(num_chars, encode)


def _check_length(name: str, num_tokens: int, limits: Limits) -> None:
    """Of what is asked for token by token. Raises `RequestError` (400) where it is more than a context."""
    if num_tokens > limits.max_model_tokens:
        reason = f"{name} has {num_tokens} tokens, more than the model's context of {limits.max_model_tokens}"
        raise RequestError(reason, param=name, code="context_length_exceeded")
