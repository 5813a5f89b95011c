"""Seconds of a step as a function of its shape, fitted to steps that were measured."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowkv.sim.costs import Curve, Fit, StepShape

_NUM_FOLDS = 5
_MIN_A_KNOT = 8  # samples on either side of a bend, or it follows noise
_TOLERANCE = 1e-10
_NUM_REWEIGHTED = 3
_INTERRUPTED = 2.0  # so many times the prediction
_PREFILL_KNOTS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048)
_DECODE_KNOTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

Array = NDArray[np.float64]


class Measured(NamedTuple):
    """`num_steps` steps, alike but for their context: `shape` holds their sums, `seconds` too."""

    shape: StepShape
    seconds: float
    num_steps: int = 1


class Fitted(NamedTuple):
    """`held_out_error` is the mean over samples that were left out of |predicted - measured| / measured;
    `held_out_bias` that of the difference with its sign, weighted by seconds. `errors` has the error of each form."""

    fit: Fit
    form: str
    held_out_error: float
    held_out_bias: float
    errors: dict[str, float]


def fit_steps(samples: Sequence[Measured], seed: int = 0) -> Fitted:
    """The form whose error on samples left out is the lowest: `lines`, in which a prompt token costs the same however
    many there are (the features of `costs.AnalyticCost`), or `curves`, which bend where the grid of shapes has points.

    ValueError for too few samples to leave some out.
    """
    if len(samples) < 2 * _NUM_FOLDS:
        raise ValueError(f"{len(samples)} samples are too few to fit")
    forms = {"lines": _lines, "curves": _curves}
    held_out = {name: _held_out(samples, knots, seed) for name, knots in forms.items()}
    errors = {name: float(np.mean(np.abs(relative))) for name, relative in held_out.items()}
    best = min(errors, key=lambda name: errors[name])
    seconds = np.array([sample.seconds for sample in samples])
    bias = float(np.sum(held_out[best] * seconds) / np.sum(seconds))
    return Fitted(_fit(samples, *forms[best](samples)), best, errors[best], bias, errors)


def predicted_s(fit: Fit, sample: Measured) -> float:
    """Of all its steps together."""
    prefill, decode = fit.prefill.counts, fit.decode.counts
    coefficients = [fit.step_s, fit.pair_s, fit.slot_s, fit.row_s, *_slopes(fit.prefill), *_slopes(fit.decode)]
    return float(_features(sample, prefill, decode) @ np.array(coefficients))


def non_negative_least_squares(a: Array, b: Array) -> Array:
    """The x >= 0 that minimises |a x - b| (Lawson and Hanson, Solving Least Squares Problems, chapter 23).

    `a` is [m, n], `b` [m]; the result is [n].
    """
    x = np.zeros(a.shape[1])
    passive = np.zeros(a.shape[1], dtype=bool)
    bound = _TOLERANCE * float(np.abs(a.T @ b).max(initial=0.0))
    for _ in range(3 * a.shape[1]):
        gradient = a.T @ (b - a @ x)
        if passive.all() or gradient[~passive].max() <= bound:
            break
        passive[np.argmax(np.where(passive, -np.inf, gradient))] = True
        x = _within_bounds(a, b, x, passive)
    return x


def _within_bounds(a: Array, b: Array, x: Array, passive: NDArray[np.bool_]) -> Array:
    """The best point on the way from `x` to the solution over `passive`, which loses what would turn negative."""
    while True:
        solution = np.zeros_like(x)
        solution[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
        falling = passive & (solution <= 0)
        if not falling.any():
            return solution
        x = x + np.min(x[falling] / (x[falling] - solution[falling])) * (solution - x)
        passive &= x > _TOLERANCE * np.abs(x).max(initial=0.0)


# --- forms ---------------------------------------------------------------------------------------------------------

Knots = Callable[[Sequence[Measured]], tuple[list[int], list[int]]]  # of the curves of prompts and of decodes


def _lines(samples: Sequence[Measured]) -> tuple[list[int], list[int]]:
    return [0, 1], [0, 1]


def _curves(samples: Sequence[Measured]) -> tuple[list[int], list[int]]:
    tokens = [sample.shape.prefill_tokens for sample in samples if sample.shape.prefill_tokens]
    choices = [_choices(sample) for sample in samples if sample.shape.decode_choices]
    return _bends(_PREFILL_KNOTS, tokens), _bends(_DECODE_KNOTS, choices)


def _bends(knots: Sequence[int], values: Sequence[int]) -> list[int]:
    """Those knots with enough values on both sides; the last is where nothing bends any more."""
    kept = [0]
    for knot in knots[1:]:
        num_before = sum(kept[-1] < value <= knot for value in values)
        if num_before >= _MIN_A_KNOT and sum(value > knot for value in values) >= _MIN_A_KNOT:
            kept.append(knot)
    return [*kept, kept[-1] + 1]


def _choices(sample: Measured) -> int:
    return sample.shape.decode_choices // sample.num_steps


def _features(sample: Measured, prefill: Sequence[int], decode: Sequence[int]) -> Array:
    """[4 + segments]: steps, pairs, slots, rows, then how far each segment of the two curves was passed."""
    shape = sample.shape
    passed = [*_passed(shape.prefill_tokens, prefill), *(sample.num_steps * _passed(_choices(sample), decode))]
    return np.array([sample.num_steps, shape.prefill_pairs, shape.decode_context_tokens, shape.num_drawn, *passed])


def _passed(count: int, knots: Sequence[int]) -> Array:
    """How much of `count` lies in each segment between the knots; the last has no end."""
    ends = np.array([*knots[1:-1], np.inf])
    starts = np.array(knots[:-1], dtype=np.float64)
    passed: Array = np.clip(float(count), starts, ends) - starts
    return passed


def _fit(samples: Sequence[Measured], prefill: list[int], decode: list[int]) -> Fit:
    """Least squares of errors relative to what is predicted: relative to what was measured, steps that came out short
    would count for more, and the mean would come out low. Samples of over twice the prediction are of interruptions."""
    rows = np.array([_features(sample, prefill, decode) for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    solved = _solve(rows, seconds, seconds)
    for _ in range(_NUM_REWEIGHTED):
        predicted = rows @ solved
        kept = seconds <= _INTERRUPTED * predicted
        solved = _solve(rows[kept], seconds[kept], predicted[kept])
    step_s, pair_s, slot_s, row_s, *slopes = solved.tolist()
    return Fit(
        step_s=step_s, pair_s=pair_s, slot_s=slot_s, row_s=row_s,
        prefill=_curve(prefill, slopes[: len(prefill) - 1]), decode=_curve(decode, slopes[len(prefill) - 1 :]),
    )  # fmt: skip


def _solve(rows: Array, seconds: Array, typical_s: Array) -> Array:
    weighted = rows / typical_s[:, None]
    scales = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    solution: Array = non_negative_least_squares(weighted / scales, seconds / typical_s) / scales
    return solution


def _curve(knots: list[int], slopes: list[float]) -> Curve:
    return Curve(knots, [0.0, *np.cumsum(np.diff(knots) * slopes).tolist()])


def _slopes(curve: Curve) -> list[float]:
    slopes: list[float] = (np.diff(curve.seconds) / np.diff(curve.counts)).tolist()
    return slopes


def _held_out(samples: Sequence[Measured], knots: Knots, seed: int) -> Array:
    """[samples]: relative error of each, predicted from the other folds."""
    order = np.random.default_rng(seed).permutation(len(samples))
    errors = np.zeros(len(samples))
    for fold in range(_NUM_FOLDS):
        left_out = order[fold::_NUM_FOLDS]
        kept = [samples[i] for i in order if i not in set(left_out.tolist())]
        fit = _fit(kept, *knots(kept))
        for i in left_out:
            errors[i] = predicted_s(fit, samples[i]) / samples[i].seconds - 1.0
    return errors
