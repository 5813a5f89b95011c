"""From a conversation's body to the ids that the model gets, and to how its answer is bound and read."""

from dataclasses import dataclass

from flowkv.server.api.parameters import Binding
from flowkv.server.api.text_service import TextService
from flowkv.server.bodies.chat import ChatBody
from flowkv.server.text.chat_template import Conversation
from flowkv.server.tools.plan import ToolPlan


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    token_ids: list[int]
    plan: ToolPlan
    binding: Binding


async def chat_prompt(service: TextService, body: ChatBody, num_chars: int) -> ChatPrompt:
    """`num_chars`: at least of what is to be tokenized. Raises `RequestError`."""
    service.check_model(body.model)
    service.frontend.limits()  # nothing is tokenized for a cluster that is not there
    plan = service.tool_planner.plan(
        body.tools, body.tool_choice, body.constraint, parallel=body.parallel_tool_calls is not False
    )
    binding = await service.binding(plan.constraint)

    def encode() -> list[int]:
        conversation = Conversation(
            [message.plain() for message in body.messages],
            plan.shown,
            body.add_generation_prompt is not False,
            bool(body.continue_final_message),
            body.chat_template_kwargs or {},
        )
        return service.tokenizer.encode_chat(conversation)

    return ChatPrompt(await service.off_loop(num_chars, encode), plan, binding)
