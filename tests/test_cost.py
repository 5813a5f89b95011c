import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.cost import LearntCost, prefill_pairs

# Seconds: a step, a choice, a KV slot; a step with a chunk, a prompt token, a pair.
DECODE = (0.008, 5e-5, 2e-8)
PREFILL = (0.002, 4e-5, 3e-9)


def truth(tokens: int, pairs: float, choices: int, context: float) -> float:
    (d0, d1, d2), (p0, p1, p2) = DECODE, PREFILL
    base_s = d0
    if tokens:
        on_prompt_s = p0 + p1 * tokens + p2 * pairs
        base_s = max(d0, on_prompt_s) if choices else on_prompt_s
    return base_s + d1 * choices + d2 * context


def taught(seed: int, count: int, noise: float = 0.0, prior: LearntCost | None = None) -> LearntCost:
    """Steps of all kinds, in the order in which a busy instance makes them: at random."""
    drawn, cost = random.Random(seed), LearntCost(prior)
    for _ in range(count):
        choices = drawn.randint(0, 100)
        context = choices * drawn.randint(100, 4000)
        tokens = drawn.choice([0, drawn.randint(16, 2048)]) if choices else drawn.randint(16, 2048)
        pairs = prefill_pairs(drawn.choice([0, 0, 4096]), tokens) if tokens else 0
        factor = 1 + noise * drawn.gauss(0, 1)
        cost.learn(tokens, pairs, choices, context, factor * truth(tokens, pairs, choices, context))
    return cost


def test_what_every_kind_of_step_takes_is_learnt_from_noisy_steps() -> None:
    cost = taught(1, 1000, noise=0.05)
    shapes = [(0, 0, 1, 200), (0, 0, 64, 64 * 2000), (512, prefill_pairs(0, 512), 0, 0)]
    shapes += [(1024, prefill_pairs(4096, 1024), 0, 0), (1024, prefill_pairs(0, 1024), 32, 32 * 1000)]
    for shape in shapes:
        assert cost.step_s(*shape) == pytest.approx(truth(*shape), rel=0.05), shape


def test_without_noise_the_coefficients_themselves_are_found() -> None:
    c = taught(2, 2000).coefficients()
    assert (c.d0, c.d1, c.d2) == pytest.approx(DECODE, rel=0.1)
    assert (c.p1, c.p2) == pytest.approx(PREFILL[1:], rel=0.1)


def test_a_small_chunk_beside_decodes_is_free_until_it_takes_longer_than_reading_the_weights() -> None:
    cost = taught(3, 1000)
    alone_s = cost.step_s(0, 0, 8, 8000)
    assert cost.step_s(16, prefill_pairs(0, 16), 8, 8000) == pytest.approx(alone_s)
    assert cost.step_s(1024, prefill_pairs(0, 1024), 8, 8000) > 2 * alone_s


def test_sums_over_steps_that_only_decode_teach_what_the_single_steps_do() -> None:
    single, summed = LearntCost(), LearntCost()
    for round_ in range(40):
        steps = [(4 + round_ % 5, 1000 + 300 * (round_ % 7) + i) for i in range(10)]
        seconds = [truth(0, 0, *step) for step in steps]
        for step, step_s in zip(steps, seconds, strict=True):
            single.learn(0, 0, *step, step_s)
        summed.learn(0, 0, sum(c for c, _ in steps), sum(s for _, s in steps), sum(seconds), num_steps=10)
    for shape in ((4, 1000), (8, 3000)):
        assert single.step_s(0, 0, *shape) == pytest.approx(truth(0, 0, *shape), rel=0.05)
        assert summed.step_s(0, 0, *shape) == pytest.approx(truth(0, 0, *shape), rel=0.05)


def test_it_follows_hardware_that_becomes_slower() -> None:
    cost = LearntCost()
    for seconds in [0.01] * 500 + [0.03] * 2000:
        cost.learn(0, 0, 4, 1000, seconds)
    assert cost.step_s(0, 0, 4, 1000) == pytest.approx(0.03, rel=0.02)


def taught_plainly() -> LearntCost:
    """0.7 ms a prompt token, 50 ms a step that decodes."""
    cost = LearntCost()
    for i in range(100):
        tokens, choices = 100 + 10 * i, 1 + i % 8
        cost.learn(tokens, prefill_pairs(0, tokens), 0, 0, 7e-4 * tokens)
        cost.learn(0, 0, choices, choices * 100, 0.05)
    return cost


def test_what_an_instance_has_not_done_it_takes_from_the_others() -> None:
    mine = LearntCost(taught_plainly())
    assert mine.step_s(500, prefill_pairs(0, 500), 0, 0) == pytest.approx(0.35, rel=0.1)
    assert mine.step_s(0, 0, 4, 400) == pytest.approx(0.05, rel=0.1)
    for i in range(100):
        mine.learn(100 + 10 * i, prefill_pairs(0, 100 + 10 * i), 0, 0, 2e-4 * (100 + 10 * i))
    assert mine.step_s(0, 0, 4, 400) == pytest.approx(0.05, rel=0.1)  # of decodes it still knows nothing


def test_hope_is_for_what_was_never_tried() -> None:
    mine = LearntCost(taught_plainly())
    mine.learn(500, prefill_pairs(0, 500), 0, 0, 0.35)
    hoped, known = mine.hopeful(), mine.coefficients()
    assert (hoped.p0, hoped.p1, hoped.p2) == (known.p0, known.p1, known.p2)
    assert 0 < hoped.d0 < known.d0


def test_what_it_does_itself_an_instance_knows_better_than_from_others() -> None:
    common = LearntCost()
    for i in range(100):
        common.learn(100 + 10 * i, prefill_pairs(0, 100 + 10 * i), 0, 0, 7e-4 * (100 + 10 * i))
    mine = LearntCost(common)
    for i in range(100):
        mine.learn(100 + 10 * i, prefill_pairs(0, 100 + 10 * i), 0, 0, 2e-4 * (100 + 10 * i))
    assert mine.step_s(500, prefill_pairs(0, 500), 0, 0) == pytest.approx(0.1, rel=0.1)


def test_a_mixed_step_faster_than_a_decode_step_costs_the_prompt_nothing_less() -> None:
    cost = LearntCost()
    for _ in range(20):
        cost.learn(0, 0, 1, 100, 1.0)
    before = cost.coefficients()
    cost.learn(10, prefill_pairs(0, 10), 1, 100, 0.5)
    assert cost.coefficients().p1 == before.p1


def test_a_step_without_time_teaches_nothing() -> None:
    cost = LearntCost()
    cost.learn(10, 55, 0, 0, 0.0)
    cost.learn(0, 0, 1, 10, -1.0)
    assert cost.num_samples == 0


samples = st.tuples(
    st.integers(0, 100_000), st.integers(0, 131_072), st.integers(0, 1024), st.integers(0, 2000), st.floats(1e-7, 1e3)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(samples, max_size=40), st.lists(samples, max_size=10))
def test_no_steps_make_anything_cost_less_than_nothing(
    mine: list[tuple[int, int, int, int, float]], others: list[tuple[int, int, int, int, float]]
) -> None:
    common = LearntCost()
    cost = LearntCost(common)
    for target, steps in ((common, others), (cost, mine)):
        for tokens, start, choices, context_each, seconds in steps:
            target.learn(tokens, prefill_pairs(start, tokens), choices, choices * context_each, seconds)
            c = target.coefficients()
            assert min(c.d0, c.d1, c.d2, c.p0, c.p1, c.p2) >= 0
    assert cost.step_s(1000, prefill_pairs(0, 1000), 5, 500) < float("inf")


@settings(max_examples=200, deadline=None)
@given(
    bound_s=st.floats(0.001, 1.0),
    choices=st.integers(1, 200),
    context_each=st.integers(0, 4000),
    start=st.integers(0, 100_000),
    seed=st.integers(0, 5),
)
def test_the_largest_chunk_keeps_the_bound_and_one_token_more_does_not(
    bound_s: float, choices: int, context_each: int, start: int, seed: int
) -> None:
    cost, context = taught(seed, 60, noise=0.02), choices * context_each
    tokens = cost.max_prefill_tokens(bound_s, choices, context, start)
    if tokens == 0:
        assert cost.step_s(1, prefill_pairs(start, 1), choices, context) >= bound_s * (1 - 1e-6)
        return
    slack_s = bound_s * 1e-9 + cost.coefficients().p2 * (tokens + 1)  # each token's pair with itself counts as half
    assert cost.step_s(tokens, prefill_pairs(start, tokens), choices, context) <= bound_s + slack_s
    more = tokens + 1
    assert cost.step_s(more, prefill_pairs(start, more), choices, context) >= bound_s - slack_s


def test_pairs_of_a_chunk_are_those_of_its_tokens() -> None:
    assert prefill_pairs(0, 3) == 1 + 2 + 3
    assert prefill_pairs(10, 2) == 11 + 12
    assert prefill_pairs(0, 7) == prefill_pairs(0, 3) + prefill_pairs(3, 4)
