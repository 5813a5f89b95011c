"""`POST /v1/chat/completions`."""

from starlette.requests import Request

from flowkv.errors import RequestError
from flowkv.server.chat_body import ChatBody, decode_chat
from flowkv.server.chat_format import ChatFormat
from flowkv.server.chat_template import Conversation
from flowkv.server.endpoint import Endpoint
from flowkv.server.generation import GenerationResponse
from flowkv.server.response import StreamUsage
from flowkv.server.structured import Constraint
from flowkv.server.text_service import TextService
from flowkv.server.tools.plan import ToolPlan


class ChatApi:
    def __init__(self, service: TextService) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                path="/v1/chat/completions", method="POST", handler=self.chat, body=ChatBody,
                summary="Answer a conversation, through the model's own chat template", is_streamed=True,
            )
        ]  # fmt: skip

    async def chat(self, request: Request) -> GenerationResponse:
        service = self._service
        arrival_s = service.frontend.now_s()
        data = await service.read(request)
        body = decode_chat(data)
        service.check_model(body.model)
        service.frontend.limits()
        plan = service.tool_planner.plan(body.tools, body.tool_choice, parallel=body.parallel_tool_calls is not False)
        binding = await service.binding(self._constraint(body, plan))
        conversation = self._conversation(body, plan)
        prompt_ids = await service.off_loop(len(data), lambda: service.tokenizer.encode_chat(conversation))
        head = service.head("chatcmpl-", request)
        requests = service.requests(head, body, [prompt_ids], binding)
        shape = ChatFormat(
            head,
            StreamUsage.of(body.stream_options),
            service.tokenizer,
            prompt_ids,
            plan,
            logprobs=bool(body.logprobs),
            token_ids=bool(body.return_token_ids),
        )
        return service.respond(body, requests, shape, arrival_s, plan.markers)

    def _conversation(self, body: ChatBody, plan: ToolPlan) -> Conversation:
        return Conversation(
            [message.plain() for message in body.messages],
            plan.shown,
            body.add_generation_prompt is not False,
            bool(body.continue_final_message),
            body.chat_template_kwargs or {},
        )

    def _constraint(self, body: ChatBody, plan: ToolPlan) -> Constraint | None:
        """Calls that are required go before the format that answers in text should have."""
        asked = body.constraint
        if asked is not None and plan.shown and plan.constraint is None:
            reason = f'{asked.param} would keep the model from calling tools: set tool_choice to "none" or "required"'
            raise RequestError(reason, param=asked.param)
        return plan.constraint or asked
