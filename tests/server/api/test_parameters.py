import json
from typing import Any

import pytest

from flowkv.config import LimitsConfig
from flowkv.errors import RequestError
from flowkv.server.api.parameters import build_request
from flowkv.server.bodies.chat import decode_chat
from flowkv.server.bodies.completions import decode_completion
from flowkv.server.limits import Limits
from flowkv.types import ModelInfo, Request, SamplingParams

MODEL = ModelInfo(name="toy", dtype="float32", vocab_size=256, max_model_tokens=100)
LIMITS = Limits.of(MODEL, 100)


def build(prompt_ids: list[int], limits: Limits = LIMITS, **fields: Any) -> Request:
    body = decode_completion(json.dumps({"prompt": "x", **fields}).encode())
    return build_request("r0", body, prompt_ids, limits, frozenset({2}))


def test_defaults() -> None:
    sampling = build([1, 2, 3]).sampling
    assert sampling == SamplingParams(max_tokens=97, seed=sampling.seed, stop_token_ids=frozenset({2}))
    assert sampling.seed != build([1, 2, 3]).sampling.seed
    assert 0 <= sampling.seed < 2**63


def test_the_priority_is_zero_unless_it_is_given() -> None:
    assert [build([1], **fields).priority for fields in ({}, {"priority": -3}, {"priority": None})] == [0, -3, 0]


def test_everything_that_is_given_is_passed_on() -> None:
    sampling = build(
        [1],
        max_tokens=5,
        min_tokens=2,
        n=3,
        temperature=0,
        top_p=0.5,
        top_k=10**9,
        min_p=0.1,
        seed=7,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=1,
        stop_token_ids=[9],
        logprobs=0,
    ).sampling
    assert sampling == SamplingParams(
        max_tokens=5,
        min_tokens=2,
        n=3,
        temperature=0.0,
        top_p=0.5,
        top_k=256,
        min_p=0.1,
        seed=7,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        stop_token_ids=frozenset({2, 9}),
        logprobs=0,
    )


def test_ignore_eos_keeps_only_the_client_s_stop_ids() -> None:
    assert build([1], ignore_eos=True, stop_token_ids=[9]).sampling.stop_token_ids == {9}


def test_negative_seed_and_top_k() -> None:
    sampling = build([1], seed=-1, top_k=-1).sampling
    assert (sampling.seed, sampling.top_k) == (2**63 - 1, 0)


def test_echo_asks_for_the_prompt_s_logprobs() -> None:
    assert build([1], echo=True, logprobs=3, max_tokens=0).sampling.prompt_logprobs == 3
    assert build([1], logprobs=3).sampling.prompt_logprobs is None
    assert build([1], echo=True).sampling.prompt_logprobs is None


def test_chat_fields() -> None:
    fields = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "max_completion_tokens": 4}
    body = decode_chat(json.dumps({**fields, "logprobs": True, "top_logprobs": 2}).encode())
    sampling = build_request("r0", body, [1], LIMITS, frozenset()).sampling
    assert (sampling.max_tokens, sampling.logprobs) == (4, 2)
    body = decode_chat(json.dumps({**fields, "logprobs": True}).encode())
    assert build_request("r0", body, [1], LIMITS, frozenset()).sampling.logprobs == 0


@pytest.mark.parametrize(
    ("prompt_ids", "fields", "limits", "words"),
    [
        ([], {}, LIMITS, ["no token"]),
        ([256], {}, LIMITS, ["256", "vocabulary"]),
        ([-1], {}, LIMITS, ["-1", "vocabulary"]),
        ([10**30], {}, LIMITS, ["vocabulary"]),
        ([1] * 100, {}, LIMITS, ["context length is 100", "101"]),
        ([1] * 50, {"max_tokens": 51}, LIMITS, ["context length is 100", "50 in the prompt", "51 to come"]),
        ([1], {"max_tokens": 10**18}, LIMITS, ["context length is 100"]),
        ([1] * 30, {"max_tokens": 3}, Limits.of(MODEL, 32), ["KV pool", "32 tokens"]),
        ([1], {"stop_token_ids": [256]}, LIMITS, ["stop_token_ids", "vocabulary"]),
        ([1], {"min_tokens": 6, "max_tokens": 5}, LIMITS, ["min_tokens"]),
    ],
)
def test_limits_are_named(prompt_ids: list[int], fields: dict[str, Any], limits: Limits, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        build(prompt_ids, limits, **fields)
    assert caught.value.status == 400
    assert all(word in caught.value.message for word in words)


def test_a_request_may_fill_the_context() -> None:
    assert build([1] * 50, max_tokens=50).max_total_tokens == 100
    assert build([1] * 99).sampling.max_tokens == 1
    assert build([1] * 30, Limits.of(MODEL, 32)).sampling.max_tokens == 2


def test_an_operator_may_allow_less_than_the_cluster_can() -> None:
    limits = Limits.of(MODEL, 100, LimitsConfig(prompt_tokens=3, choices=2))
    assert build([1, 2, 3], limits, n=2).sampling.n == 2
    with pytest.raises(RequestError, match="the prompt has 4 tokens, more than the 3") as refused:
        build([1, 2, 3, 4], limits)
    assert refused.value.code == "prompt_too_long"
    with pytest.raises(RequestError, match="n of 3 is more than the 2 choices") as refused:
        build([1], limits, n=3)
    assert (refused.value.code, refused.value.param) == ("too_many_choices", "n")
