"""From logits to tokens.

A draw is a pure function of the logits and of (seed, choice, output index): nothing depends on what else is in the
batch, and no state is kept. The order of the steps is that of others: penalties, `logit_bias`, the grammar,
`min_tokens`, temperature, top-k, top-p, min-p, draw.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from flowkv.model.cpu_kernel import storage_view
from flowkv.model.numba_kernels import best_tokens
from flowkv.types import NO_TOKEN, SamplingParams, TokenLogprobs

MASK_64 = (1 << 64) - 1
LOWEST_TEMPERATURE = 1e-6  # below it, logits divided by it overflow


Sample = tuple[int, TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class DrawSpec:
    """One token wanted from row `row` of the logits. `output_ids` is what the choice has put out before it.

    `allowed` says of every token, a bit each, whether a grammar lets it be the next; those beyond its end may not be.
    """

    row: int
    sampling: SamplingParams
    choice: int
    prompt_ids: Sequence[int]
    output_ids: list[int]
    allowed: npt.NDArray[np.uint8] | None = None

    @property
    def is_masked(self) -> bool:
        return bool(self.sampling.stop_token_ids) and len(self.output_ids) < self.sampling.min_tokens

    @property
    def is_adjusted(self) -> bool:
        """The draw is from other logits than the model's."""
        params = self.sampling
        return params.has_penalties or bool(params.logit_bias) or self.allowed is not None or self.is_masked

    @property
    def is_plain(self) -> bool:
        """Nothing is wanted but the highest logit."""
        return self.sampling.is_greedy and self.sampling.logprobs is None and not self.is_adjusted


def sample(logits: torch.Tensor, specs: Sequence[DrawSpec]) -> list[Sample]:
    """One token, with log probabilities where they are asked for, for each spec.

    logits [R, V], of any float type, as the model gave them. NO_TOKEN for a spec whose row has a NaN, an infinity, or
    nothing left that may be drawn: the other rows are none the worse for it.
    """
    rows = [spec.row for spec in specs]
    raw = logits if rows == list(range(len(logits))) else logits[rows]
    if all(spec.is_plain for spec in specs):
        best, highest = highest_of(raw)
        return [
            (token_id if math.isfinite(peak) else NO_TOKEN, None) for token_id, peak in zip(best, highest, strict=True)
        ]
    wanted = adjusted(raw.float(), specs)
    is_sound = torch.isfinite(wanted.amax(dim=-1))  # a NaN anywhere in a row is its highest
    token_ids = draw(torch.where(is_sound[:, None], wanted, 0.0), specs)
    samples = zip(token_ids, drawn_logprobs(raw, token_ids, specs), strict=True)
    return [drawn if sound else (NO_TOKEN, None) for drawn, sound in zip(samples, is_sound.tolist(), strict=True)]


def highest_of(logits: torch.Tensor) -> tuple[list[int], list[float]]:
    """The first place of the highest of each row, and that; a NaN anywhere in a row is its highest."""
    if logits.device.type != "cpu":
        highest, places = logits.max(dim=-1)
        return places.tolist(), highest.tolist()
    best, peaks = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
    best_tokens(storage_view(logits.contiguous()), best, peaks)
    return best.tolist(), peaks.tolist()


def adjusted(raw: torch.Tensor, specs: Sequence[DrawSpec]) -> torch.Tensor:
    """float32 logits after penalties, biases and masks; `raw` stays as it is."""
    if not any(spec.is_adjusted for spec in specs):
        return raw
    logits = raw.clone()
    for row, spec in zip(logits, specs, strict=True):
        if spec.sampling.has_penalties:
            penalize(row, spec)
        if spec.sampling.logit_bias:
            bias(row, spec.sampling.logit_bias)
        if spec.allowed is not None:
            row.masked_fill_(forbidden(spec.allowed, len(row)).to(row.device), float("-inf"))
        if spec.is_masked:
            mask_stops(row, spec)
    return logits


def penalize(row: torch.Tensor, spec: DrawSpec) -> None:
    """In place. Repetition (over prompt and output) divides positive logits and multiplies negative ones by the
    penalty; presence and frequency (over the output) subtract theirs once, and once a time a token occurred."""
    params = spec.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*spec.prompt_ids, *spec.output_ids}), dtype=torch.long, device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if spec.output_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(spec.output_ids)
        times = torch.tensor(list(counts.values()), device=row.device)
        row[list(counts)] -= params.presence_penalty + params.frequency_penalty * times


def bias(row: torch.Tensor, biases: Mapping[int, float]) -> None:
    """In place: add to the logits of some tokens."""
    known = {token_id: value for token_id, value in biases.items() if token_id < len(row)}
    row[list(known)] += torch.tensor(list(known.values()), dtype=row.dtype, device=row.device)


def forbidden(allowed: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """Of each of `size` tokens, whether its bit is not set: bool [size]."""
    return torch.from_numpy(np.unpackbits(allowed, count=size, bitorder="little") == 0)


def mask_stops(row: torch.Tensor, spec: DrawSpec) -> None:
    """In place, before `min_tokens` are out. Where a grammar leaves nothing but its end, it ends all the same."""
    stops = [token_id for token_id in spec.sampling.stop_token_ids if token_id < len(row)]
    values = row[stops]
    row[stops] = float("-inf")
    if spec.allowed is not None and row.amax() == float("-inf"):
        row[stops] = values


def draw(logits: torch.Tensor, specs: Sequence[DrawSpec]) -> list[int]:
    """logits [R, V] after penalties -> a token id a row."""
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    random = [index for index, spec in enumerate(specs) if not spec.sampling.is_greedy]
    if random:
        drawn = draw_random(logits[random], [specs[index] for index in random])
        for index, token_id in zip(random, drawn, strict=True):
            token_ids[index] = token_id
    return token_ids


def draw_random(logits: torch.Tensor, specs: Sequence[DrawSpec]) -> list[int]:
    """Inverse of the cumulative distribution over the kept tokens, in order of their ids, in float64."""
    temperature = column([max(spec.sampling.temperature, LOWEST_TEMPERATURE) for spec in specs], logits)
    weights = keep((logits.double() / temperature).softmax(dim=-1), specs)
    cumulative = weights.cumsum(dim=-1)
    uniforms = [uniform(spec.sampling.seed, spec.choice, len(spec.output_ids)) for spec in specs]
    total = cumulative[:, -1:]
    # Rounding must not carry the target to the total itself, behind which there is no token.
    target = torch.minimum(column(uniforms, logits) * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn: list[int] = torch.searchsorted(cumulative, target, right=True)[:, 0].tolist()
    return drawn


def keep(probabilities: torch.Tensor, specs: Sequence[DrawSpec]) -> torch.Tensor:
    """Probabilities [R, V] (float64) with those outside top-k, top-p and min-p set to 0, not normalised again.

    Tokens as probable as the k-th stay with it. Top-p keeps the fewest of the most probable tokens that reach p of
    what top-k left; min-p those at least as probable as min-p times the most probable.
    """
    params = [spec.sampling for spec in specs]
    vocab_size = probabilities.shape[-1]
    kept = probabilities
    if any(0 < p.top_k < vocab_size or p.top_p < 1.0 for p in params):
        ordered, order = probabilities.sort(dim=-1, descending=True)
        last = [min(p.top_k or vocab_size, vocab_size) - 1 for p in params]
        lowest = ordered.gather(1, torch.tensor(last, device=ordered.device)[:, None])
        ordered = ordered.where(ordered >= lowest, 0.0)
        before = ordered.cumsum(dim=-1) - ordered
        share = column([p.top_p for p in params], ordered)
        inside = (before < share * ordered.sum(dim=-1, keepdim=True)) | (share >= 1.0)
        inside[:, 0] = True
        kept = torch.zeros_like(kept).scatter(1, order, ordered.where(inside, 0.0))
    if any(p.min_p > 0.0 for p in params):
        bound = column([p.min_p for p in params], kept) * kept.amax(dim=-1, keepdim=True)
        kept = kept.where(kept >= bound, 0.0)
    return kept


def column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on its three arguments alone."""
    state = 0
    for value in (seed, choice, index):
        state = splitmix64((state + value) & MASK_64)
    return (state >> 11) * 2.0**-53


def splitmix64(state: int) -> int:
    """One output of the generator of Steele, Lea and Flood (OOPSLA 2014) for the given state."""
    mixed = (state + 0x9E3779B97F4A7C15) & MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK_64
    return mixed ^ (mixed >> 31)


def drawn_logprobs(
    raw: torch.Tensor, token_ids: Sequence[int], specs: Sequence[DrawSpec]
) -> list[TokenLogprobs | None]:
    """Of the raw logits, for the specs that ask for them."""
    wanted = [(index, spec.sampling.logprobs) for index, spec in enumerate(specs)]
    found: list[TokenLogprobs | None] = [None] * len(specs)
    rows = [(index, num_top) for index, num_top in wanted if num_top is not None]
    if rows:
        indices = [index for index, _ in rows]
        ids = [token_ids[index] for index in indices]
        for index, entry in zip(indices, token_logprobs(raw[indices], ids, [top for _, top in rows]), strict=True):
            found[index] = entry
    return found


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """logits [R, V] as the model gave them: for row i the entry of `token_ids[i]` with its `num_top[i]` best."""
    if not token_ids:
        return []
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(max(num_top), logprobs.shape[-1]), dim=-1)
    tops = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    parts = zip(token_ids, own, tops, num_top, strict=True)
    return [TokenLogprobs(token_id, logprob, top[:count]) for token_id, logprob, top, count in parts]
