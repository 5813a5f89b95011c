"""What passes between the engine, which decides, and a `Runner`, which computes."""

import math
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import msgspec

from flowkv.engine.sequence import Sequence
from flowkv.types import TokenLogprobs


class BatchItem(msgspec.Struct, frozen=True):
    """Compute positions `start` to `start + num_tokens` of a sequence, writing their KV through its block table.

    Where `draws` is not empty the last position's logits are drawn from, once for each choice named in it.
    Where the request asks for prompt log probabilities, every position whose next token is of the prompt yields one.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draws: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


class Batch(msgspec.Struct, frozen=True):
    """One step, or `num_repeats` alike. `copies` (source block, destination block) are made before anything is computed
    (copy-on-write).

    Only steps that do nothing but decode are repeated: every item has one token and one draw, which is the token that
    its next repetition computes, one position on; the blocks of all repetitions are in the block tables. Fewer may be
    made: none after a step that ends at or after `until_s`, and none after one in which a message or a completion came
    (unless tokens may come in bursts: nothing breaks if the engine hears of it later).
    """

    batch_id: int
    items: tuple[BatchItem, ...]
    copies: tuple[tuple[int, int], ...] = ()
    num_repeats: int = 1
    until_s: float = math.inf

    @property
    def num_tokens(self) -> int:
        """Of one repetition."""
        return sum(item.num_tokens for item in self.items)


class Draw(msgspec.Struct, frozen=True):
    """`token_id` is NO_TOKEN where the logits were not numbers, or all masked; NO_WAY where a grammar did that."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class ItemResult(msgspec.Struct, frozen=True):
    """`draws` in the order of the item's, or of the steps made; `prompt_logprobs` for the tokens at `start + 1` to
    `stop`, prompt only."""

    draws: list[Draw] = []
    prompt_logprobs: list[TokenLogprobs] = []


class BatchResult(msgspec.Struct, frozen=True):
    """Of `num_steps` steps. `step_seconds` says how long each of them took, where that is known; seconds are sums."""

    batch_id: int
    items: list[ItemResult]
    forward_seconds: float = 0.0
    sampling_seconds: float = 0.0
    num_steps: int = 1
    step_seconds: SequenceOf[float] | None = None


class Runner(Protocol):
    """A batch in, tokens out. The only part of an instance that knows what a block holds."""

    def run(self, batch: Batch) -> BatchResult:
        """One step, however many repetitions the batch asks for (`engine.repeat.run_repeats` makes them all)."""

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks (source, destination); no destination is a source. Not while a batch runs."""
