"""The fit: a known function is found again, and what was left out is predicted."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.profile.fit import Measured, fit_steps, non_negative_least_squares, predicted_s
from flowkv.sim.costs import FittedCost, LinkSpeeds, Profile, StepShape

Truth = Callable[[StepShape, int], float]


def straight_s(shape: StepShape, num_steps: int) -> float:
    on_prompts = 4e-5 * shape.prefill_tokens + 3e-8 * shape.prefill_pairs
    on_decodes = 2e-4 * shape.decode_choices + 2e-7 * shape.decode_context_tokens
    return 1.5e-3 * num_steps + on_prompts + on_decodes + 2e-5 * shape.num_drawn


def bent_s(shape: StepShape, num_steps: int) -> float:
    """A second price for each token up to 64, and for each choice up to 8."""
    num_choices = shape.decode_choices // num_steps
    extra_s = 6e-5 * min(64, shape.prefill_tokens) + num_steps * 8e-4 * min(8, num_choices)
    return straight_s(shape, num_steps) + extra_s


def samples(truth: Truth, noise: float, count: int = 400) -> list[Measured]:
    draw = random.Random(1)
    result = []
    for _ in range(count):
        num_choices = draw.choice([0, 1, 2, 4, 8, 16, 32])
        tokens = draw.choice([0, 16, 64, 128, 512] if num_choices else [16, 48, 64, 128, 512])
        num_steps = 1 if tokens else draw.randrange(1, 20)
        num_decodes = num_choices * num_steps
        pairs = tokens * draw.randrange(1500) + tokens * (tokens + 1) // 2
        context_tokens = num_decodes * draw.randrange(1, 1500)
        shape = StepShape(
            tokens, pairs, num_decodes, context_tokens, num_decodes + (tokens > 0 and draw.random() < 0.5)
        )
        seconds = truth(shape, num_steps) * (1 + noise * draw.gauss(0, 1))
        result.append(Measured(shape, seconds, num_steps))
    return result


@pytest.mark.parametrize("truth", [straight_s, bent_s])
def test_without_noise_the_function_is_found(truth: Truth) -> None:
    measured = samples(truth, noise=0.0)
    fitted = fit_steps(measured)
    assert fitted.held_out_error < 1e-6
    for sample in measured:
        assert predicted_s(fitted.fit, sample) == pytest.approx(sample.seconds, rel=1e-6)


def test_with_noise_the_error_is_that_of_the_noise() -> None:
    fitted = fit_steps(samples(bent_s, noise=0.02))
    assert fitted.form == "curves"
    assert 0.01 < fitted.held_out_error < 0.025  # the mean of |N(0, 0.02)| is 0.016
    assert abs(fitted.held_out_bias) < 0.005
    assert fitted.errors["lines"] > 2 * fitted.errors["curves"]


def test_interruptions_do_not_count() -> None:
    measured = samples(straight_s, noise=0.01)
    disturbed = [s._replace(seconds=5 * s.seconds) if i % 10 == 0 else s for i, s in enumerate(measured)]
    fit = fit_steps(disturbed).fit
    assert predicted_s(fit, measured[0]) == pytest.approx(
        straight_s(measured[0].shape, measured[0].num_steps), rel=0.02
    )


def test_long_steps_count_as_much_as_short_ones() -> None:
    """So that the mean is right: half of these steps take 0.7 of it, half 1.3."""
    measured = samples(straight_s, noise=0.0)
    spread = [s._replace(seconds=(0.7, 1.3)[i % 2] * s.seconds) for i, s in enumerate(measured)]
    fitted = fit_steps(spread)
    total_s = sum(predicted_s(fitted.fit, sample) for sample in measured)
    assert total_s == pytest.approx(sum(sample.seconds for sample in measured), rel=0.03)


def test_the_cost_model_says_what_was_fitted() -> None:
    """`costs.FittedCost` computes what `predicted_s` does, on its own."""
    measured = samples(bent_s, noise=0.01)
    fit = fit_steps(measured).fit
    model = FittedCost(
        Profile(
            format="", model="", dtype="", hardware="", max_model_tokens=1, vocab_size=1, token_bytes=1, kv_bytes=1,
            noise_fraction=0, fit=fit, links=LinkSpeeds(link_bytes_per_s=1, call_s=0, message_s=0),
        ),
        "",
    )  # fmt: skip
    singles = [sample for sample in measured if sample.num_steps == 1]
    assert singles
    for sample in singles:
        assert model.step_s(sample.shape) == pytest.approx(predicted_s(fit, sample))


def test_seconds_never_fall_and_are_never_negative_whatever_was_measured() -> None:
    draw = random.Random(2)
    noise = [Measured(sample.shape, draw.uniform(1e-4, 1e-1), sample.num_steps) for sample in samples(straight_s, 0.0)]
    fitted = fit_steps(noise)  # `Fit` and `Curve` refuse to be made otherwise
    assert fitted.held_out_error > 0.3


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="9 samples are too few"):
        fit_steps(samples(straight_s, 0.0, count=9))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(6, 12))
def test_non_negative_least_squares_is_optimal(seed: int, num_columns: int, num_rows: int) -> None:
    """The conditions of Karush, Kuhn and Tucker: no coefficient is negative, no gradient points inward at a bound, and
    it is zero elsewhere."""
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(num_rows, num_columns)), draw.normal(size=num_rows)
    x = non_negative_least_squares(a, b)
    gradient = a.T @ (b - a @ x)
    assert (x >= 0).all()
    assert (gradient <= 1e-6).all()
    assert np.abs(gradient[x > 0]).max(initial=0.0) < 1e-6
