"""`POST /v1/responses`: text and calls of functions; no answer is stored."""

from starlette.requests import Request

from flowkv.server.answers.generation import GenerationResponse
from flowkv.server.answers.responses import ResponseObject, ResponsesFormat
from flowkv.server.api.chat_prompt import chat_prompt
from flowkv.server.api.endpoint import GENERATION_ERRORS, Endpoint
from flowkv.server.api.text_service import TextService
from flowkv.server.bodies.responses import ResponsesBody, decode_responses


class ResponsesApi:
    def __init__(self, service: TextService) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                path="/v1/responses", method="POST", handler=self.respond, body=ResponsesBody,
                summary="Answer in OpenAI's newer form", is_streamed=True,
                answer=ResponseObject, errors=GENERATION_ERRORS,
            )
        ]  # fmt: skip

    async def respond(self, request: Request) -> GenerationResponse:
        service = self._service
        arrival_s = service.frontend.now_s()
        data = await service.read(request)
        body = decode_responses(data)
        chat = body.chat()
        prompt = await chat_prompt(service, chat, len(data))
        head = service.head("resp_", request)
        requests = service.requests(head, chat, [prompt.token_ids], prompt.binding)
        shape = ResponsesFormat(head, body, service.tokenizer, prompt.plan.tools)
        return service.respond(chat, requests, shape, arrival_s, prompt.plan.tools.markers, prompt.plan.new_counter)
