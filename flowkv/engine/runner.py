"""The Runner that computes: packs a batch, runs the model over the KV pool, draws tokens."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flowkv.engine.batch import Batch, BatchItem, BatchResult, Draw, ItemResult
from flowkv.grammar.matchers import Matchers
from flowkv.kv.layout import KvLayout
from flowkv.model.loading import DTYPES, LoadedModel
from flowkv.model.packing import pack
from flowkv.model.sampler import DrawSpec, sample, token_logprobs
from flowkv.types import NO_TOKEN, NO_WAY, TokenLogprobs

_BLOCKS_A_COPY = 32


@dataclass(frozen=True, slots=True)
class ItemRows:
    """Which rows of the logits belong to an item: first `num_prompt` for prompt log probabilities, then, where it
    draws, the row at `draw_row`."""

    first: int
    num_prompt: int
    draw_row: int


class TorchRunner:
    """`pool_buffer` is the whole pool, writable, `num_blocks * layout.block_bytes` long."""

    def __init__(
        self, loaded: LoadedModel, layout: KvLayout, pool_buffer: memoryview, num_blocks: int, matchers: Matchers
    ) -> None:
        self._matchers = matchers
        self._block_size = layout.block_size
        flat = torch.frombuffer(pool_buffer, dtype=DTYPES[layout.dtype])
        self._pool = flat.view(num_blocks, *layout.block_shape)
        self._forward = loaded.model.over(self._pool)

    @torch.inference_mode()
    def run(self, batch: Batch) -> BatchResult:
        started_s = time.perf_counter()
        self.copy_blocks(batch.copies)
        kept, places = needed_rows(batch.items)
        logits = self._logits(batch.items, kept)
        computed_s = time.perf_counter()
        draws = self._draw(logits, batch.items, places)
        items = [
            ItemResult(drawn, prompt_logprobs(logits, item, place))
            for item, place, drawn in zip(batch.items, places, draws, strict=True)
        ]
        return BatchResult(
            batch_id=batch.batch_id,
            items=items,
            forward_seconds=computed_s - started_s,
            sampling_seconds=time.perf_counter() - computed_s,
        )

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Some at a time: what is gathered passes through memory of its own."""
        for start in range(0, len(copies), _BLOCKS_A_COPY):
            sources, destinations = zip(*copies[start : start + _BLOCKS_A_COPY], strict=True)
            self._pool[list(destinations)] = self._pool[list(sources)]

    def _logits(self, items: tuple[BatchItem, ...], kept: list[int]) -> torch.Tensor:
        """Logits [len(kept), V] of the query tokens `kept`, counted over the whole batch."""
        packed = pack(
            [item.start for item in items],
            [item.num_tokens for item in items],
            [item.sequence.block_table for item in items],
            self._block_size,
        )
        ids = [token_id for item in items for token_id in item.sequence.token_ids(item.start, item.stop)]
        token_ids = torch.tensor(ids, device=self._pool.device)
        rows = torch.tensor(kept, dtype=torch.long, device=self._pool.device)
        return self._forward(packed, token_ids, rows)

    def _draw(self, logits: torch.Tensor, items: tuple[BatchItem, ...], places: list[ItemRows]) -> list[list[Draw]]:
        """Every item's draws, all made in one call."""
        specs = list(self._draw_specs(items, places))
        results = sample(logits, specs) if specs else []
        drawn = iter([_draw(spec, *result) for spec, result in zip(specs, results, strict=True)])
        return [[next(drawn) for _ in item.draws] for item in items]

    def _draw_specs(self, items: tuple[BatchItem, ...], places: list[ItemRows]) -> Iterator[DrawSpec]:
        for item, place in zip(items, places, strict=True):
            request, output_ids = item.sequence.request, item.sequence.output_ids
            for choice in item.draws:
                allowed = self._matchers.allowed(request, choice, output_ids)
                yield DrawSpec(place.draw_row, request.sampling, choice, request.prompt_ids, output_ids, allowed)


def _draw(spec: DrawSpec, token_id: int, logprobs: TokenLogprobs | None) -> Draw:
    if token_id == NO_TOKEN and spec.allowed is not None and not spec.allowed.any():
        return Draw(NO_WAY)
    return Draw(token_id, logprobs)


def needed_rows(items: tuple[BatchItem, ...]) -> tuple[list[int], list[ItemRows]]:
    """The query tokens whose logits are needed, and where each item finds its own among them."""
    kept: list[int] = []
    places = []
    first_token = 0
    for item in items:
        first, num_prompt = len(kept), num_prompt_rows(item)
        kept += range(first_token, first_token + num_prompt)
        first_token += item.num_tokens
        if item.draws and num_prompt < item.num_tokens:
            kept.append(first_token - 1)
        places.append(ItemRows(first, num_prompt, len(kept) - 1))
    return kept, places


def num_prompt_rows(item: BatchItem) -> int:
    """Positions of the item whose next token is a prompt token, if the request wants their log probabilities."""
    if item.sequence.request.sampling.prompt_logprobs is None:
        return 0
    return max(0, min(item.stop, item.sequence.num_prompt - 1) - item.start)


def prompt_logprobs(logits: torch.Tensor, item: BatchItem, place: ItemRows) -> list[TokenLogprobs]:
    """Of the prompt tokens after each of the item's positions."""
    if not place.num_prompt:
        return []
    num_top = item.sequence.request.sampling.prompt_logprobs or 0
    next_ids = item.sequence.token_ids(item.start + 1, item.start + 1 + place.num_prompt)
    rows = logits[place.first : place.first + place.num_prompt]
    return token_logprobs(rows, next_ids, [num_top] * place.num_prompt)
