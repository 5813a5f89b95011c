"""Which shapes of steps are measured: the cells of a grid, in random order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

_TAILS = (1, 8, 16, 48, 96, 160, 256, 384, 512)  # tokens of a prompt's last chunk
_MIXED_PROMPTS = (16, 48, 96, 160, 256, 384)
_MAX_GRID_TOKENS = 8192  # of a request: longer ones take long to measure and say nothing new


@dataclass(frozen=True, slots=True)
class Cell:
    """`num_decodes` requests are brought to decode; then the prompts come one after the other; or, where there are
    none, the decodes go on for `num_steps`.
    """

    num_decodes: int
    context_tokens: int  # of each decode, where it begins
    num_steps: int
    prompts: tuple[int, ...] = ()


def grid(max_batch_tokens: int, max_choices: int, max_tokens: int, is_quick: bool) -> list[Cell]:
    """For requests of up to `max_tokens` tokens. Decodes come in batches of powers of two."""
    max_tokens = min(max_tokens, _MAX_GRID_TOKENS)
    starts = _spread(0, max(0, max_tokens - max_batch_tokens), 2 if is_quick else 4, max_batch_tokens)
    contexts = _spread(16, max(16, max_tokens - 64), 2 if is_quick else 4, 16)
    tails = [n for n in _TAILS[:: 3 if is_quick else 1] if n <= max_batch_tokens]
    batches = [2**i for i in range(0, 10, 2 if is_quick else 1) if 2**i <= min(max_choices, 64)]
    num_steps = 12 if is_quick else 24
    cells = [Cell(0, 0, 0, tuple(start + tail for tail in tails if start + tail <= max_tokens)) for start in starts]
    cells += [Cell(n, context, num_steps) for n in batches for context in contexts]
    prompts = tuple(n for n in _MIXED_PROMPTS[:: 2 if is_quick else 1] if n <= min(max_batch_tokens, max_tokens))
    cells += [Cell(n, context, 0, prompts) for n in batches for context in contexts[::2]]
    return [cell for cell in cells if cell.context_tokens + cell.num_steps <= max_tokens]


def shuffled(cells: Sequence[Cell], num_repeats: int, seed: int) -> list[Cell]:
    """Each `num_repeats` times, so that what drifts falls on all alike."""
    order = random.Random(seed)
    return [cell for _ in range(num_repeats) for cell in order.sample(cells, len(cells))]


def _spread(low: int, high: int, count: int, multiple: int) -> list[int]:
    """`count` values from `low` to `high`, each but `low` rounded down to a multiple."""
    values = [low + (high - low) * i // max(1, count - 1) for i in range(count)]
    return sorted({low, *(max(low, value - value % multiple) for value in values)})
