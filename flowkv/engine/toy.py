"""A model that is nothing but a check of the KV cache.

The value written for a token is a hash of (token, position, layer, K or V); the next token is a hash of everything
that is read back through the block table, each value mixed with the position it was read at. One swapped block, one
lost layer, one flipped bit changes the output; garbage in an unused slot does not.
"""

import time
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from flowkv.engine.batch import Batch, BatchItem, BatchResult, Draw, ItemResult
from flowkv.grammar.matchers import Bits, Matchers
from flowkv.grammar.vocabulary import BYTE_END_ID, Vocabulary
from flowkv.kv.layout import KvLayout
from flowkv.types import NO_TOKEN, NO_WAY, Request, SamplingParams, TokenLogprobs

Hashes = npt.NDArray[np.uint64]

VOCAB_SIZE = 256
MAX_MODEL_TOKENS = 8192
_PRINTABLE = range(32, 127)
_MAX_PLACES = 256  # of choices in their grammars


def toy_layout(block_size: int) -> KvLayout:
    return KvLayout(num_layers=3, num_kv_heads=1, head_dim=1, block_size=block_size, dtype="int64")


class ToyRunner:
    """A `Runner` over a pool of `toy_layout`; every step takes at least `step_s`."""

    def __init__(self, layout: KvLayout, pool_buffer: memoryview, num_blocks: int, step_s: float = 0.0) -> None:
        self._layout = layout
        shape = (num_blocks, layout.num_layers, 2, layout.block_size)
        self._pool: Hashes = np.frombuffer(pool_buffer, np.uint64).reshape(shape)
        self._step_s = step_s
        self._matchers = Matchers(Vocabulary.of_bytes(), _MAX_PLACES)

    def run(self, batch: Batch) -> BatchResult:
        started_s = time.perf_counter()
        self.copy_blocks(batch.copies)
        items = [self._run_item(item) for item in batch.items]
        if (rest_s := self._step_s - (time.perf_counter() - started_s)) > 0:
            time.sleep(rest_s)
        return BatchResult(batch.batch_id, items, forward_seconds=time.perf_counter() - started_s)

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        for src, dst in copies:
            self._pool[dst] = self._pool[src]

    def _run_item(self, item: BatchItem) -> ItemResult:
        sequence = item.sequence
        token_ids = sequence.token_ids(item.start, item.stop)
        self._write(token_ids, item.start, sequence.block_table)
        state = self._read(item.stop, sequence.block_table) if item.draws else 0
        draws = [self._draw(state, sequence.request, choice, sequence.output_ids) for choice in item.draws]
        return ItemResult(draws, self._prompt_logprobs(item))

    def _write(self, token_ids: list[int], start: int, block_table: list[int]) -> None:
        size = self._layout.block_size
        positions = np.arange(start, start + len(token_ids))
        blocks = np.asarray(block_table)[positions // size]
        ids = np.asarray(token_ids, np.uint64)
        for layer in range(self._layout.num_layers):
            for kv in range(2):
                salt = np.uint64(2 * layer + kv)
                values = _mix(ids * np.uint64(2654435761) + _mix(positions.astype(np.uint64) * np.uint64(64) + salt))
                self._pool[blocks, layer, kv, positions % size] = values

    def _read(self, num_tokens: int, block_table: list[int]) -> int:
        """A hash of the KV of positions 0 to `num_tokens`, as it stands in the pool."""
        num_blocks = -(-num_tokens // self._layout.block_size)
        values = self._pool[np.asarray(block_table[:num_blocks])]  # [blocks, layers, 2, slots]
        values = values.transpose(1, 2, 0, 3).reshape(2 * self._layout.num_layers, -1)[:, :num_tokens]
        places = np.arange(values.size, dtype=np.uint64).reshape(values.shape)
        return int(np.bitwise_xor.reduce(_mix(values ^ _mix(places)), axis=None))

    def _draw(self, state: int, request: Request, choice: int, output_ids: list[int]) -> Draw:
        """Greedy takes the state as it is; sampling adds (seed, choice, output index), the counter of its draws."""
        sampling = request.sampling
        number = state
        if not sampling.is_greedy:
            number = _hash(state, sampling.seed, choice, len(output_ids))
        allowed = self._matchers.allowed(request, choice, output_ids)
        candidates = _candidates(sampling, allowed, len(output_ids))
        if not candidates:
            return Draw(NO_TOKEN if allowed is None or allowed.any() else NO_WAY)
        may_end = sampling.grammar is not None and candidates[-1] == BYTE_END_ID
        token_id = BYTE_END_ID if may_end and number % 2 else candidates[number % len(candidates)]
        logprob = -1.0 - number % 1000 / 1000
        logprobs = None if sampling.logprobs is None else TokenLogprobs(token_id, logprob, [(token_id, logprob)])
        return Draw(token_id, logprobs)

    def _prompt_logprobs(self, item: BatchItem) -> list[TokenLogprobs]:
        request = item.sequence.request
        if request.sampling.prompt_logprobs is None:
            return []
        following = request.prompt_ids[item.start + 1 : item.stop + 1]
        return [TokenLogprobs(token_id, -1.0, [(token_id, -1.0)]) for token_id in following]


def _candidates(sampling: SamplingParams, allowed: Bits | None, num_output: int) -> SequenceOf[int]:
    """The tokens that may be drawn, in order: all equally probable, but for their biases. Printable ones, as long as
    a grammar leaves any of them."""
    candidates: SequenceOf[int] = _PRINTABLE
    if allowed is not None:
        left = np.flatnonzero(np.unpackbits(allowed, count=VOCAB_SIZE, bitorder="little")).tolist()
        candidates = [token_id for token_id in left if token_id in _PRINTABLE or token_id == BYTE_END_ID] or left
    if sampling.logit_bias:
        best = max((sampling.logit_bias.get(token_id, 0.0) for token_id in candidates), default=0.0)
        candidates = [token_id for token_id in candidates if sampling.logit_bias.get(token_id, 0.0) == best]
    if num_output < sampling.min_tokens and sampling.stop_token_ids:
        going_on = [token_id for token_id in candidates if token_id not in sampling.stop_token_ids]
        candidates = going_on if going_on or allowed is None else candidates
    return candidates


def _mix(values: Hashes) -> Hashes:
    """splitmix64's finalizer, elementwise, modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash(*numbers: int) -> int:
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15) + np.array([number % 2**64], np.uint64))
    return int(state[0])
