import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkv.model.sampler import DrawSpec, adjusted, draw, highest_of, keep, sample, token_logprobs, uniform
from flowkv.types import NO_TOKEN, SamplingParams

VOCAB_SIZE = 40
PINNED = (0.13870941014555427, 0.4841172365889662)


def spec(
    row: int = 0,
    choice: int = 0,
    prompt_ids: list[int] | None = None,
    output_ids: list[int] | None = None,
    allowed: set[int] | None = None,
    **params: Any,
) -> DrawSpec:
    bits = None if allowed is None else np.packbits([i in allowed for i in range(VOCAB_SIZE)], bitorder="little")
    return DrawSpec(row, SamplingParams(max_tokens=99, **params), choice, prompt_ids or [], output_ids or [], bits)


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def drawn_ids(logits: torch.Tensor, specs: list[DrawSpec]) -> list[int]:
    return [token_id for token_id, _ in sample(logits, specs)]


params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-9, 0.5, 1.0, 2.0]),
        "top_k": st.integers(0, 60),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "seed": st.integers(-(2**63), 2**64),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.frozensets(st.integers(0, VOCAB_SIZE + 5), max_size=3),
        "logprobs": st.integers(0, 50),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE + 5), st.floats(-100, 100), max_size=3),
    },
)
token_lists = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5)
specs = st.lists(
    st.builds(
        lambda choice, prompt, output, allowed, chosen: spec(0, choice, prompt, output, allowed, **chosen),
        st.integers(0, 3), token_lists, token_lists,
        st.none() | st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1), params,
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


@given(specs, st.integers(0, 1000))
def test_a_draw_depends_on_nothing_else_in_the_batch(wanted: list[DrawSpec], seed: int) -> None:
    logits = logits_of(seed, len(wanted))
    placed = [replace(s, row=row) for row, s in enumerate(wanted)]
    together = sample(logits, placed)
    alone = [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(wanted)]
    assert [token_id for token_id, _ in together] == [token_id for token_id, _ in alone]
    backwards = sample(logits, placed[::-1])[::-1]
    assert backwards == together


@given(st.integers(0, 1000), params)
def test_the_support_is_what_top_k_top_p_and_min_p_leave(seed: int, chosen: dict[str, Any]) -> None:
    sampling = spec(**chosen).sampling
    probabilities = logits_of(seed).double().softmax(-1)
    kept = {index for index, weight in enumerate(keep(probabilities, [spec(**chosen)])[0].tolist()) if weight > 0}
    ranked = sorted(enumerate(probabilities[0].tolist()), key=lambda entry: -entry[1])
    ranked = ranked[: sampling.top_k or None]
    total, reached, expected = sum(weight for _, weight in ranked), 0.0, set()
    for token_id, weight in ranked:
        if reached < sampling.top_p * total and weight >= sampling.min_p * ranked[0][1]:
            expected.add(token_id)
        reached += weight
    assert kept == expected


def test_top_p_counts_what_top_k_left_as_the_whole() -> None:
    probabilities = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).double()
    assert keep(probabilities, [spec(top_k=2, top_p=0.5)]).nonzero().tolist() == [[0, 1]]
    assert keep(probabilities, [spec(top_p=0.5)]).nonzero().tolist() == [[0, 1], [0, 3]]


def test_many_draws_have_the_model_s_distribution() -> None:
    """Chi-square over 20,000 draws of as many seeds; the same draws in every run."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    num_draws = 20_000
    seeds = [spec(seed=seed) for seed in range(num_draws)]
    drawn = torch.tensor(draw(logits.expand(num_draws, -1), seeds))
    expected = logits[0].double().softmax(-1) * num_draws
    chi_square = ((drawn.bincount(minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # exceeded by one truly random run in a thousand (4 degrees of freedom)


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_uniform_numbers_are_spread_over_each_argument(varied: int) -> None:
    numbers = [uniform(*(index if place == varied else 11 for place in range(3))) for index in range(10_000)]
    assert min(numbers) >= 0.0
    assert max(numbers) < 1.0
    assert len(set(numbers)) == len(numbers)
    tenths = torch.tensor(numbers).histc(10, 0.0, 1.0)
    assert ((tenths - 1000) ** 2 / 1000).sum() < 27.9  # one in a thousand, 9 degrees of freedom


def test_uniform_numbers_never_change() -> None:
    """A request must go on with the same draws on an instance of another version."""
    assert uniform(0, 0, 0) == PINNED[0]
    assert uniform(2**63, 1, 5) == PINNED[1]


def test_choices_and_output_indices_draw_differently() -> None:
    logits = torch.zeros(1, 10_000)
    wanted = [spec(seed=1, choice=choice, output_ids=[0] * index) for choice in range(5) for index in range(5)]
    assert len(set(drawn_ids(logits, wanted))) > 20


@given(st.integers(0, 1000), token_lists, token_lists, st.floats(0.5, 2.0), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_follow_the_formula(
    seed: int, prompt_ids: list[int], output_ids: list[int], repetition: float, presence: float, frequency: float
) -> None:
    logits = logits_of(seed)
    expected = logits[0].tolist()
    for token_id in range(VOCAB_SIZE):
        if token_id in prompt_ids + output_ids:
            expected[token_id] *= 1 / repetition if expected[token_id] > 0 else repetition
        if token_id in output_ids:
            expected[token_id] -= presence + frequency * output_ids.count(token_id)
    penalties: dict[str, Any] = {
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }
    found = adjusted(logits, [spec(prompt_ids=prompt_ids, output_ids=output_ids, **penalties)])
    assert found[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(logits, logits_of(seed))


def test_stop_ids_cannot_come_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3], logits[0, 9], logits[0, 5] = 9.0, 8.0, 7.0
    limits: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": frozenset({3, 9, 10_000})}
    for temperature in (0.0, 0.01):
        found = [
            drawn_ids(logits, [spec(temperature=temperature, output_ids=[1] * count, **limits)])[0]
            for count in range(4)
        ]
        assert found == [5, 5, 3, 3]


@given(st.integers(0, 1000), st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1), params)
def test_what_a_grammar_does_not_allow_is_never_drawn(seed: int, allowed: set[int], chosen: dict[str, Any]) -> None:
    token_id = drawn_ids(logits_of(seed), [spec(allowed=allowed, **chosen)])[0]
    assert token_id in allowed


def test_the_best_that_a_grammar_allows_is_taken() -> None:
    logits = logits_of(2)
    allowed = {3, 8, 21}
    assert drawn_ids(logits, [spec(temperature=0.0, allowed=allowed)]) == [
        max(allowed, key=lambda i: float(logits[0, i]))
    ]


def test_a_grammar_s_end_comes_before_min_tokens_only_where_nothing_else_may() -> None:
    limits: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": frozenset({3})}
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3] = 9.0
    assert drawn_ids(logits, [spec(allowed={3, 7}, **limits)]) == [7]
    assert drawn_ids(logits, [spec(allowed={3, 7}, output_ids=[7, 7], **limits)]) == [3]
    assert drawn_ids(logits, [spec(allowed={3}, **limits)]) == [3]


def test_a_grammar_that_allows_nothing_and_tokens_that_its_vocabulary_has_not() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    bits = np.packbits([False] * 7 + [True], bitorder="little")  # of eight tokens, where the model has more
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(max_tokens=9, temperature=temperature)
        assert drawn_ids(logits, [DrawSpec(0, sampling, 0, [], [], bits)]) == [7]
        assert sample(logits, [spec(allowed=set(), temperature=temperature, logprobs=1)]) == [(NO_TOKEN, None)]


@given(st.integers(0, 1000), st.integers(0, VOCAB_SIZE - 1), st.sampled_from([0.0, 1.0]))
def test_biases_ban_and_choose(seed: int, token_id: int, temperature: float) -> None:
    logits = logits_of(seed)
    banned = spec(temperature=temperature, seed=seed, logit_bias={token_id: -100.0})
    chosen = spec(temperature=temperature, seed=seed, logit_bias={token_id: 100.0, VOCAB_SIZE + 3: 100.0})
    assert drawn_ids(logits, [banned])[0] != token_id
    assert drawn_ids(logits, [chosen])[0] == token_id
    assert torch.equal(logits, logits_of(seed))


def test_biases_are_added_after_penalties() -> None:
    logits = torch.full((1, VOCAB_SIZE), 2.0)
    found = adjusted(logits, [spec(prompt_ids=[4, 5], repetition_penalty=2.0, logit_bias={4: 0.5, 6: -1.5})])[0]
    assert found[[4, 5, 6, 7]].tolist() == [1.5, 1.0, 0.5, 2.0]


def test_log_probabilities_know_nothing_of_grammars_and_biases() -> None:
    logits = logits_of(7)
    entry = sample(logits, [spec(temperature=0.0, allowed={4}, logit_bias={4: 3.0}, logprobs=0)])[0][1]
    assert entry is not None and entry.logprob == logits.log_softmax(-1)[0, 4].item()


def test_greedy_takes_the_highest() -> None:
    logits = logits_of(3, 4)
    wanted = [spec(row, temperature=0.0) for row in (2, 0, 0)]
    assert drawn_ids(logits, wanted) == logits[[2, 0, 0]].argmax(-1).tolist()


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1, 15, 512, 513, 1600]),
    num_levels=st.sampled_from([2, 50, 10_000]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_greedy_takes_the_first_of_the_highest(dtype: torch.dtype, size: int, num_levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randint(num_levels, (3, size), generator=generator) - num_levels // 2).to(dtype)
    places, peaks = highest_of(logits)
    for row, place, peak in zip(logits.float(), places, peaks, strict=True):
        assert peak == row.max() and row[place] == peak and not (row[:place] == peak).any()


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = logits_of(5, 2).bfloat16()
    wanted = [
        spec(1, temperature=2.0, top_k=3, repetition_penalty=1.5, prompt_ids=[1], logprobs=3),
        spec(0, temperature=0.0, logprobs=0),
        spec(0, temperature=0.0),
    ]
    expected = logits.float().log_softmax(-1)
    (first, with_top), (second, alone), (_, nothing) = sample(logits, wanted)
    assert with_top is not None
    assert with_top.token_id == first
    assert with_top.logprob == expected[1, first].item()
    assert with_top.top == list(
        zip(expected[1].topk(3).indices.tolist(), expected[1].topk(3).values.tolist(), strict=True)
    )
    assert alone is not None
    assert (alone.token_id, alone.logprob, alone.top) == (second, expected[0, second].item(), [])
    assert nothing is None


def test_more_alternatives_than_tokens_are_all_of_them() -> None:
    (entry,) = token_logprobs(logits_of(1), [4], [VOCAB_SIZE + 20])
    assert sorted(token_id for token_id, _ in entry.top) == list(range(VOCAB_SIZE))
    assert sum(math.exp(logprob) for _, logprob in entry.top) == pytest.approx(1.0)


def test_where_parameters_leave_nothing_to_draw_nothing_is_drawn() -> None:
    everything = frozenset(range(VOCAB_SIZE))
    for temperature in (0.0, 1.0):
        masked = spec(0, temperature=temperature, min_tokens=5, stop_token_ids=everything)
        overflowing = spec(0, temperature=temperature, repetition_penalty=1e-45, prompt_ids=list(range(VOCAB_SIZE)))
        assert sample(logits_of(1), [masked, overflowing]) == [(NO_TOKEN, None)] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_from_logits_that_are_not_numbers_nothing_is_drawn_and_the_others_do_not_notice(
    bad: float, temperature: float
) -> None:
    logits = logits_of(1, 2)
    logits[1, 7] = bad
    alone = sample(logits, [spec(0, temperature=temperature)])
    both = sample(logits, [spec(1, temperature=temperature), spec(0, temperature=temperature)])
    assert both == [(NO_TOKEN, None), *alone]
