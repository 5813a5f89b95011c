"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from flowkv.errors import RequestError
from flowkv.server.chat_body import ChatMessage
from flowkv.server.endpoint import Endpoint, json_response
from flowkv.server.protocol import decode
from flowkv.server.text_service import TextService


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """A `prompt`, or else `messages`: special tokens are added to the one, and are the template's with the other."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None  # as the vocabulary has them


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[int]
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
                summary="Token ids of a prompt or a conversation",
            ),
            Endpoint(
                path="/detokenize", method="POST", handler=self.detokenize, body=DetokenizeBody, answer=Detokenized,
                summary="Text of token ids, special tokens included",
            ),
        ]  # fmt: skip

    async def tokenize(self, request: Request) -> Response:
        service = self._service
        body = decode(_tokenize_decoder, await service.read(request))
        service.check_model(body.model)
        limits = service.frontend.limits()
        token_ids = await self._ids(body)
        texts = [service.tokenizer.token_piece(token_id) for token_id in token_ids] if body.return_token_strs else None
        return json_response(Tokenized(len(token_ids), limits.max_request_tokens, token_ids, texts))

    async def detokenize(self, request: Request) -> Response:
        service = self._service
        body = decode(_detokenize_decoder, await service.read(request))
        service.check_model(body.model)
        service.frontend.limits().check_ids("tokens", body.tokens)
        return json_response(Detokenized(service.tokenizer.decode(body.tokens)))

    async def _ids(self, body: TokenizeBody) -> list[int]:
        service = self._service
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("either prompt or messages is needed, and not both", param="prompt")
        if body.prompt is not None:
            return await service.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        messages: list[dict[str, Any]] = []
        for number, message in enumerate(body.messages or []):
            message.check(f"messages[{number}]")
            messages.append(message.plain())
        return await service.off_loop(
            sum(len(message["content"]) for message in messages), lambda: service.tokenizer.encode_chat(messages)
        )
