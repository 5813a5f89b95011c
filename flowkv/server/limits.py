"""What the cluster can take at the moment, and what is refused since it is more."""

from collections.abc import Collection
from dataclasses import dataclass

from flowkv.config import LimitsConfig
from flowkv.errors import RequestError
from flowkv.types import ModelInfo


@dataclass(frozen=True, slots=True)
class Limits:
    """Lengths in tokens, prompt and output together."""

    vocab_size: int
    max_model_tokens: int
    max_request_tokens: int  # the smaller of the context and the largest pool
    max_prompt_tokens: int = 0  # 0: no limit but the one above
    max_choices: int = 0  # 0: no limit of the operator's

    @classmethod
    def of(cls, model: ModelInfo, max_request_tokens: int, config: LimitsConfig | None = None) -> "Limits":
        config = config or LimitsConfig()
        room = min(max_request_tokens, model.max_model_tokens)
        return cls(model.vocab_size, model.max_model_tokens, room, config.prompt_tokens, config.choices)

    def check_ids(self, name: str, token_ids: Collection[int]) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            bad = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            reason = f"{name} holds the token id {bad}, outside the vocabulary of {self.vocab_size}"
            raise RequestError(reason, param=name)

    def check_choices(self, num_choices: int) -> None:
        if self.max_choices and num_choices > self.max_choices:
            reason = f"n of {num_choices} is more than the {self.max_choices} choices that this server allows"
            raise RequestError(reason, param="n", code="too_many_choices")

    def check_length(self, name: str, num_prompt: int, max_tokens: int) -> None:
        if self.max_prompt_tokens and num_prompt > self.max_prompt_tokens:
            reason = (
                f"the prompt has {num_prompt} tokens, more than the {self.max_prompt_tokens} that this server allows"
            )
            raise RequestError(reason, param=name, code="prompt_too_long")
        if num_prompt + max_tokens <= self.max_request_tokens:
            return
        if self.max_request_tokens < self.max_model_tokens:
            limit = f"the KV pool holds at most {self.max_request_tokens} tokens of one request"
        else:
            limit = f"the model's context length is {self.max_model_tokens} tokens"
        asked = f"{num_prompt + max_tokens} ({num_prompt} in the prompt, {max_tokens} to come)"
        reason = f"{limit}, but this request asks for {asked}"
        raise RequestError(reason, param=name, code="context_length_exceeded")
