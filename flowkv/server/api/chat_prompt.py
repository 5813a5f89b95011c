"""From a conversation's body to the ids that the model gets, and to how its answer is bound and read."""

from dataclasses import dataclass

from flowkv.server.api.parameters import Binding
from flowkv.server.api.text_service import TextService
from flowkv.server.bodies.chat import ChatBody
from flowkv.server.reasoning.plan import AnswerPlan
from flowkv.server.text.chat_template import Conversation


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    token_ids: list[int]
    plan: AnswerPlan
    binding: Binding


async def chat_prompt(service: TextService, body: ChatBody, num_chars: int) -> ChatPrompt:
    """`num_chars`: at least of what is to be tokenized. Raises `RequestError`."""
    service.check_model(body.model)
    service.frontend.limits()  # nothing is tokenized for a cluster that is not there
    tools = service.tool_planner.plan(
        body.tools, body.tool_choice, body.constraint, parallel=body.parallel_tool_calls is not False
    )

    def encode() -> list[int]:
        conversation = Conversation(
            [message.plain() for message in body.messages],
            tools.shown,
            body.add_generation_prompt is not False,
            bool(body.continue_final_message),
            body.template_variables,
        )
        return service.tokenizer.encode_chat(conversation)

    token_ids = await service.off_loop(num_chars, encode)
    plan = AnswerPlan(tools)
    if body.separate_reasoning is not False:
        plan = service.reasoning_planner.plan(
            tools, token_ids, body.continued, is_shown=body.include_reasoning is not False
        )
    return ChatPrompt(token_ids, plan, await service.binding(plan.tools.constraint))
