"""`POST /v1/chat/completions`."""

from starlette.requests import Request

from flowkv.server.answers.chat import ChatChoice, ChatFormat
from flowkv.server.answers.envelope import Envelope, StreamUsage
from flowkv.server.answers.generation import GenerationResponse
from flowkv.server.api.chat_prompt import chat_prompt
from flowkv.server.api.endpoint import GENERATION_ERRORS, Endpoint
from flowkv.server.api.text_service import TextService
from flowkv.server.bodies.chat import ChatBody, decode_chat


class ChatApi:
    def __init__(self, service: TextService) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                path="/v1/chat/completions", method="POST", handler=self.chat, body=ChatBody,
                summary="Answer a conversation, through the model's own chat template", is_streamed=True,
                answer=Envelope[ChatChoice], errors=GENERATION_ERRORS,
            )
        ]  # fmt: skip

    async def chat(self, request: Request) -> GenerationResponse:
        service = self._service
        arrival_s = service.frontend.now_s()
        data = await service.read(request)
        body = decode_chat(data)
        prompt = await chat_prompt(service, body, len(data))
        head = service.head("chatcmpl-", request)
        requests = service.requests(head, body, [prompt.token_ids], prompt.binding)
        shape = ChatFormat(
            head,
            StreamUsage.of(body.stream_options),
            service.tokenizer,
            prompt.token_ids,
            prompt.plan.tools,
            logprobs=bool(body.logprobs),
            token_ids=bool(body.return_token_ids),
            reasoning=prompt.plan.new_counter is not None,
        )
        return service.respond(body, requests, shape, arrival_s, prompt.plan.tools.markers, prompt.plan.new_counter)
