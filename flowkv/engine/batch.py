"""What passes between the engine, which decides, and a `Runner`, which computes."""

from dataclasses import dataclass, field
from typing import Protocol

from flowkv.engine.sequence import Sequence
from flowkv.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class BatchItem:
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


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `copies` (source block, destination block) are made before anything is computed (copy-on-write)."""

    batch_id: int
    items: tuple[BatchItem, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


@dataclass(frozen=True, slots=True)
class Draw:
    """`token_id` is NO_TOKEN where the logits were not numbers, or all masked."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class ItemResult:
    """`draws` in the order of the item's; `prompt_logprobs` for the tokens at `start + 1` to `stop`, prompt only."""

    draws: list[Draw] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BatchResult:
    batch_id: int
    items: list[ItemResult]
    forward_seconds: float = 0.0
    sampling_seconds: float = 0.0


class Runner(Protocol):
    """A batch in, tokens out. The only part of an instance that knows what a block holds."""

    def run(self, batch: Batch) -> BatchResult: ...

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks (source, destination); no destination is a source. Not while a batch runs."""
