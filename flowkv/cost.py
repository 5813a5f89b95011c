"""Seconds of a step, learnt from steps that were measured.

A step that only decodes is taken to last ``d0 + d1 * choices + d2 * context``, one with prompt tokens
``max(d0, p0 + p1 * tokens + p2 * pairs) + d1 * choices + d2 * context``: tokens are what linear layers do, pairs (of a
token and a position that it attends to) what attention does, context is KV read, and the `max` says that weights are
read once a step however few tokens use them. The coefficients are fitted as the steps come: least squares of relative
errors, non-negative, the past forgotten slowly, drawn towards a prior where there is little to go by.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

_FORGET = 0.995  # weight of the past beside one new sample
_PRIOR_SAMPLES = 0.5  # that the prior's guess counts for
_OPTIMISM = 0.5
_FLOOR_MARGIN = 1.1  # a step so close to d0 says nothing of what more tokens would cost
_LOOK_EVERY = 8  # samples between two solutions, once there are many

# Guesses that are the same for every instance, so that placement goes by load until something is known. Low ones: who
# believes that steps are too long for a chunk never finds out.
_DECODE_GUESS = (1e-3, 1e-5, 1e-8)
_PREFILL_GUESS = (0.0, 1e-4, 0.0)


class _Fit:
    """Three coefficients >= 0 of a linear function whose relative errors are small."""

    def __init__(self, guess: Sequence[float]) -> None:
        self._guess = tuple(guess)
        self._xx = (0.0,) * 6  # upper triangle, by row
        self._x = (0.0,) * 3
        self._weight = 0.0
        self.num_samples = 0
        self._due = 0  # samples beyond which to solve again
        self._solution = self._guess

    def add(self, x: Sequence[float], y: float, weight: float) -> None:
        a, b, c = x[0] / y, x[1] / y, x[2] / y
        aa, ab, ac, bb, bc, cc = self._xx
        self._xx = (
            _FORGET * aa + weight * (a * a), _FORGET * ab + weight * (a * b), _FORGET * ac + weight * (a * c),
            _FORGET * bb + weight * (b * b), _FORGET * bc + weight * (b * c), _FORGET * cc + weight * (c * c),
        )  # fmt: skip
        old = self._x
        self._x = (_FORGET * old[0] + weight * a, _FORGET * old[1] + weight * b, _FORGET * old[2] + weight * c)
        self._weight = _FORGET * self._weight + weight
        self.num_samples += 1

    def coefficients(self, guess: Sequence[float] | None = None) -> tuple[float, ...]:
        """`guess` is the prior, where it is not the one given at the start."""
        if self.num_samples > self._due:
            self._due = self.num_samples + min(_LOOK_EVERY, self.num_samples // 4)
            self._solution = self._solve(self._guess if guess is None else guess)
        elif self.num_samples == 0:
            return self._guess if guess is None else tuple(guess)
        return self._solution

    def _solve(self, guess: Sequence[float]) -> tuple[float, ...]:
        """Least squares; a coefficient that comes out negative is set to zero and the others solved again."""
        aa, ab, ac, bb, bc, cc = self._xx
        full = [[aa, ab, ac], [ab, bb, bc], [ac, bc, cc]]
        kept = [i for i in range(3) if full[i][i] > 0]
        solution = [0.0 if i in kept else guess[i] for i in range(3)]
        prior = _PRIOR_SAMPLES / self._weight  # counts as samples in which each feature stood alone
        while kept:
            rows = [
                [full[i][j] + (prior * full[i][i] if i == j else 0.0) for j in kept]
                + [self._x[i] + prior * full[i][i] * guess[i]]
                for i in kept
            ]
            found = _gauss(rows)
            worst = min(range(len(kept)), key=lambda k: found[k])
            if found[worst] >= 0:
                for i, value in zip(kept, found, strict=True):
                    solution[i] = value
                break
            del kept[worst]
        return tuple(solution)


def _gauss(rows: list[list[float]]) -> list[float]:
    """The solution of a small positive definite system, given as rows with the right side appended."""
    size = len(rows)
    for i in range(size):
        pivot = rows[i][i]
        for row in rows[i + 1 :]:
            factor = row[i] / pivot
            for k in range(i, size + 1):
                row[k] -= factor * rows[i][k]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (rows[i][size] - sum(rows[i][k] * found[k] for k in range(i + 1, size))) / rows[i][i]
    return found


class StepCoefficients(NamedTuple):
    """See the top of this file; seconds, a step, token, pair, choice or slot."""

    d0: float
    d1: float
    d2: float
    p0: float
    p1: float
    p2: float


class MeasuredStep(Protocol):
    """One step, or the sums over `num_steps` that only decode (`messages.StepSample`)."""

    @property
    def prefill_tokens(self) -> int: ...
    @property
    def prefill_pairs(self) -> int: ...
    @property
    def decode_choices(self) -> int: ...
    @property
    def decode_context_tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def num_steps(self) -> int: ...


class LearntCost:
    """The steps of one instance. `prior`, which others may teach too, fills in what it has not done itself yet."""

    def __init__(self, prior: "LearntCost | None" = None) -> None:
        self._prior = prior
        self._decode = _Fit(_DECODE_GUESS)
        self._prefill = _Fit(_PREFILL_GUESS)

    @property
    def num_samples(self) -> int:
        return self._decode.num_samples + self._prefill.num_samples

    def learn(
        self,
        prefill_tokens: int,
        prefill_pairs: int,
        decode_choices: int,
        decode_context_tokens: int,
        seconds: float,
        num_steps: int = 1,
    ) -> None:
        """One measured step, or the sums over several that only decode (fields as in `messages.StepSample`)."""
        if seconds <= 0:
            return
        if prefill_tokens == 0:
            self._decode.add((num_steps, decode_choices, decode_context_tokens), seconds, num_steps)
            return
        d0, d1, d2 = self._decode_coefficients()
        on_prompt_s = seconds - d1 * decode_choices - d2 * decode_context_tokens
        is_floor = decode_choices and on_prompt_s < _FLOOR_MARGIN * d0 and self._decode.num_samples
        if on_prompt_s > 0 and not is_floor:
            self._prefill.add((1.0, prefill_tokens, prefill_pairs), on_prompt_s, 1.0)

    def learn_step(self, step: MeasuredStep) -> None:
        self.learn(
            step.prefill_tokens, step.prefill_pairs, step.decode_choices, step.decode_context_tokens, step.seconds,
            step.num_steps,
        )  # fmt: skip

    def coefficients(self) -> StepCoefficients:
        return StepCoefficients(*self._decode_coefficients(), *self._prefill_coefficients())

    def hopeful(self) -> StepCoefficients:
        """The same, but a phase that was never tried is believed to be fast: or it never would be tried."""
        decode, prefill = self._decode_coefficients(), self._prefill_coefficients()
        return StepCoefficients(*_hoped(decode, self._decode), *_hoped(prefill, self._prefill))

    def step_s(
        self, prefill_tokens: int, prefill_pairs: float, decode_choices: int, decode_context_tokens: float
    ) -> float:
        """Seconds of one step."""
        c = self.coefficients()
        base_s = c.d0
        if prefill_tokens:
            on_prompt_s = c.p0 + c.p1 * prefill_tokens + c.p2 * prefill_pairs
            base_s = max(c.d0, on_prompt_s) if decode_choices else on_prompt_s
        return base_s + c.d1 * decode_choices + c.d2 * decode_context_tokens

    def max_prefill_tokens(
        self, bound_s: float, decode_choices: float, decode_context_tokens: float, start: int
    ) -> int:
        """Most tokens of a chunk that begins at position `start`, in a step with these decodes that keeps the bound."""
        c = self.coefficients()
        left_s = bound_s - c.d1 * decode_choices - c.d2 * decode_context_tokens
        if left_s < c.d0 or left_s <= c.p0:
            return 0
        # p2 / 2 * n^2 + (p1 + p2 * (start + 1/2)) * n = left_s - p0
        half, linear, room_s = c.p2 / 2, c.p1 + c.p2 * (start + 0.5), left_s - c.p0
        if linear <= 0 and half <= 0:
            return 2**31
        root = (linear * linear + 4 * half * room_s) ** 0.5
        return int(2 * room_s / (linear + root))

    def _decode_coefficients(self) -> tuple[float, ...]:
        return _known(self._decode, None if self._prior is None else self._prior._decode)

    def _prefill_coefficients(self) -> tuple[float, ...]:
        return _known(self._prefill, None if self._prior is None else self._prior._prefill)


def _known(own: _Fit, prior: _Fit | None) -> tuple[float, ...]:
    return own.coefficients(prior.coefficients() if prior is not None and prior.num_samples else None)


def _hoped(values: tuple[float, ...], fit: _Fit) -> tuple[float, ...]:
    return values if fit.num_samples else tuple(_OPTIMISM * value for value in values)


def prefill_pairs(start: int, num_tokens: int) -> int:
    """Pairs of a token and a position that it attends to, itself included, of a chunk that begins at `start`."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2
