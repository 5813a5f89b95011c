"""From a body and a prompt's ids to a `Request` that any instance can run: defaults filled in, limits checked."""

import secrets
from collections.abc import Collection
from dataclasses import dataclass

from flowkv.config import LimitsConfig
from flowkv.errors import RequestError
from flowkv.server.bodies.generation import GenerationBody
from flowkv.types import Grammar, ModelInfo, Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cluster can take at the moment. Lengths in tokens, prompt and output together."""

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


@dataclass(frozen=True, slots=True)
class Binding:
    """A grammar that was found good, and the ids that end its answers."""

    grammar: Grammar | None = None
    end_ids: frozenset[int] = frozenset()


def build_request(
    request_id: str,
    body: GenerationBody,
    prompt_ids: list[int],
    limits: Limits,
    eos_ids: frozenset[int],
    binding: Binding = Binding(),
) -> Request:
    """Raises `RequestError` (400) naming the limit or the field that is broken."""
    if not prompt_ids:
        raise RequestError(f"{body.prompt_field} gives no token at all", param=body.prompt_field, code="empty_prompt")
    limits.check_ids(body.prompt_field, prompt_ids)
    limits.check_ids("stop_token_ids", body.stop_token_ids or [])
    limits.check_choices(body.num_choices)
    max_tokens = body.wanted_tokens
    limits.check_length(body.prompt_field, len(prompt_ids), 1 if max_tokens is None else max_tokens)
    if max_tokens is None:
        max_tokens = limits.max_request_tokens - len(prompt_ids)
    if (body.min_tokens or 0) > max_tokens:
        reason = f"min_tokens of {body.min_tokens} is more than the {max_tokens} tokens that can come"
        raise RequestError(reason, param="min_tokens")
    return Request(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=_sampling(body, max_tokens, limits, eos_ids, binding),
        priority=body.priority or 0,
    )


def _sampling(
    body: GenerationBody, max_tokens: int, limits: Limits, eos_ids: frozenset[int], binding: Binding
) -> SamplingParams:
    stop_ids = frozenset(body.stop_token_ids or ()) | binding.end_ids
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        n=body.num_choices,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=min(max(body.top_k or 0, 0), limits.vocab_size),  # -1 means all, as 0 does
        min_p=_or(body.min_p, 0.0),
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        stop_token_ids=stop_ids if body.ignore_eos else stop_ids | eos_ids,
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
        logit_bias=_logit_bias(body, limits),
        grammar=binding.grammar,
    )


def _logit_bias(body: GenerationBody, limits: Limits) -> dict[int, float]:
    biases = {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()}
    limits.check_ids("logit_bias", biases)
    return biases


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
