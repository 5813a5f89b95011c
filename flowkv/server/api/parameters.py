"""From a body and a prompt's ids to a `Request` that any instance can run: defaults filled in, limits checked."""

import secrets
from dataclasses import dataclass

from flowkv.errors import RequestError
from flowkv.server.bodies.generation import GenerationBody
from flowkv.server.limits import Limits
from flowkv.types import Grammar, Request, SamplingParams


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
