"""The Runner against `transformers` itself: chunks, single tokens and mixed batches over scattered blocks."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from flowkv.engine.batch import Batch, BatchItem, Draw, ItemResult
from flowkv.engine.runner import TorchRunner
from flowkv.engine.sequence import Sequence
from flowkv.grammar.matchers import Matchers
from flowkv.model.loading import load_model
from flowkv.types import NO_TOKEN, Request, SamplingParams
from tests.model.tiny_models import CONFIGS, VOCAB_SIZE, eager_model, save_model

BLOCK_SIZE = 4
NUM_BLOCKS = 64
PROMPT_LENGTHS = (1, 9, 22)
NUM_OUTPUT = 8


class Instance:
    """A runner with just enough of an engine around it: blocks are given out in a shuffled order, never back."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        loaded = load_model(folder, dtype)
        layout = loaded.layout(BLOCK_SIZE)
        self.pool = bytearray(b"\xff" * (NUM_BLOCKS * layout.block_bytes))  # 0xff: NaN in every dtype
        self.runner = TorchRunner(loaded, layout, memoryview(self.pool), NUM_BLOCKS, Matchers(None, 0))
        self.free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
        self.batch_ids = count()

    def sequence(self, prompt_ids: list[int], **sampling: Any) -> Sequence:
        params = SamplingParams(**{"max_tokens": NUM_OUTPUT, "temperature": 0.0, **sampling})
        request = Request(request_id=str(id(prompt_ids)), prompt_ids=prompt_ids, sampling=params)
        return Sequence(request=request, frontend_address="", arrival=0)

    def item(self, sequence: Sequence, num_tokens: int, draws: tuple[int, ...] = ()) -> BatchItem:
        stop = sequence.num_computed + num_tokens
        while len(sequence.block_table) * BLOCK_SIZE < stop:
            sequence.block_table.append(self.free.pop())
        return BatchItem(sequence, sequence.num_computed, num_tokens, draws)

    def run(self, *items: BatchItem, copies: tuple[tuple[int, int], ...] = ()) -> list[ItemResult]:
        batch_id = next(self.batch_ids)
        result = self.runner.run(Batch(batch_id, items, copies))
        assert result.batch_id == batch_id
        assert result.forward_seconds > 0
        for item in items:
            item.sequence.num_computed = item.stop
        return result.items

    def generate(self, sequences: list[Sequence], chunk_size: int = 10_000) -> None:
        """Each step takes the next chunk or token of every sequence that is not finished."""
        while going := [s for s in sequences if len(s.output_ids) < s.request.sampling.max_tokens]:
            sizes = [min(chunk_size, s.num_uncomputed) for s in going]
            ends = [size == s.num_uncomputed for s, size in zip(going, sizes, strict=True)]
            items = [
                self.item(s, size, (s.choice,) if end else ()) for s, size, end in zip(going, sizes, ends, strict=True)
            ]
            for sequence, result, end in zip(going, self.run(*items), ends, strict=True):
                assert len(result.draws) == end
                sequence.output_ids += [draw.token_id for draw in result.draws]


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves each kind of model once."""
    folders: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in folders:
            folders[name] = save_model(CONFIGS[name], tmp_path_factory.mktemp(name))
        return folders[name]

    return find


@pytest.fixture
def instance(folder_of: Callable[[str], Path]) -> Instance:
    return Instance(folder_of("llama"))


@torch.inference_mode()
def eager_logits(folder: Path, ids: SequenceOf[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits: torch.Tensor = eager_model(folder, dtype)(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.float()


def assert_greedy(logits: torch.Tensor, sequence: Sequence) -> None:
    """Every output token is the best of the reference's logits, or ties with it to rounding."""
    for position, token_id in enumerate(sequence.output_ids, start=sequence.num_prompt - 1):
        assert logits[position].max() - logits[position, token_id] < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_output_is_that_of_transformers(name: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    reference = eager_model(folder)
    instance = Instance(folder)
    for chunk_size in (10_000, 5):
        sequences = [instance.sequence(prompt) for prompt in prompts()]
        instance.generate(sequences, chunk_size)
        for sequence in sequences:
            prompt_ids = torch.tensor([sequence.request.prompt_ids])
            assert_greedy(eager_logits(folder, sequence.token_ids(0, sequence.num_tokens)), sequence)
            generated = reference.generate(  # type: ignore[operator]
                prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=NUM_OUTPUT,
                min_new_tokens=NUM_OUTPUT, do_sample=False, eos_token_id=None,
            )  # fmt: skip
            assert generated[0, sequence.num_prompt :].tolist() == sequence.output_ids


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_stays_close_to_the_model_s_own(
    dtype: str, tolerance: float, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("gemma2")
    instance = Instance(folder, dtype)
    sequence = instance.sequence(prompts()[2], logprobs=VOCAB_SIZE, prompt_logprobs=VOCAB_SIZE)
    results = [instance.run(instance.item(sequence, size, draws))[0] for size, draws in ((9, ()), (12, ()), (1, (0,)))]
    logprobs = results[2].draws[0].logprobs
    assert logprobs is not None
    found = [*results[0].prompt_logprobs, *results[1].prompt_logprobs, logprobs]
    expected = eager_logits(folder, sequence.request.prompt_ids, getattr(torch, dtype)).log_softmax(-1)
    for entry, row in zip(found, expected, strict=True):
        ours = torch.tensor([logprob for _, logprob in sorted(entry.top)])
        assert (ours - row).abs().max() < tolerance * row.abs().max()


def test_prefill_and_decode_share_a_batch(instance: Instance, folder_of: Callable[[str], Path]) -> None:
    first, second, third = (instance.sequence(prompt) for prompt in prompts())
    instance.generate([first])
    instance.run(instance.item(third, 8))
    third_again, decoded, prefilled = instance.run(
        instance.item(third, 14, (0,)), instance.item(first, 1, (0,)), instance.item(second, 9, (0,))
    )
    for sequence, result in ((third, third_again), (first, decoded), (second, prefilled)):
        sequence.output_ids += [draw.token_id for draw in result.draws]
        assert_greedy(eager_logits(folder_of("llama"), sequence.token_ids(0, sequence.num_tokens)), sequence)


def test_choices_of_one_prompt_draw_apart_and_fork(instance: Instance) -> None:
    """The last block is copied before the second choice writes into it; both then go on as if alone."""
    prompt = prompts()[1]
    sampling: dict[str, Any] = {"temperature": 1.5, "seed": 11, "n": 2}
    alone = [instance.sequence(prompt, **sampling) for _ in range(2)]
    for choice, sequence in enumerate(alone):
        sequence.choice = choice
        instance.generate([sequence])
    parent = instance.sequence(prompt, **sampling)
    (result,) = instance.run(instance.item(parent, 9, (0, 1)))
    forks = [instance.sequence(prompt, **sampling) for _ in range(2)]
    copy = instance.free.pop()
    tables = [parent.block_table, [*parent.block_table[:-1], copy]]
    for choice, (fork, draw, table) in enumerate(zip(forks, result.draws, tables, strict=True)):
        fork.choice, fork.output_ids, fork.num_computed, fork.block_table = choice, [draw.token_id], 9, list(table)
    items = [instance.item(fork, 1, (fork.choice,)) for fork in forks]
    for fork, forked in zip(forks, instance.run(*items, copies=((tables[0][-1], copy),)), strict=True):
        fork.output_ids += [draw.token_id for draw in forked.draws]
    instance.generate(forks)
    assert [fork.output_ids for fork in forks] == [sequence.output_ids for sequence in alone]
    assert forks[0].output_ids != forks[1].output_ids


def test_recomputing_prompt_and_output_goes_on_as_before(instance: Instance) -> None:
    whole, cut = (instance.sequence(prompts()[1], temperature=1.0, seed=3) for _ in range(2))
    instance.generate([whole])
    cut.output_ids = whole.output_ids[:3]
    instance.generate([cut], chunk_size=7)
    assert cut.output_ids == whole.output_ids


def test_prompt_log_probabilities_cover_the_prompt_once(instance: Instance, folder_of: Callable[[str], Path]) -> None:
    prompt = prompts()[2]
    sequence = instance.sequence(prompt, prompt_logprobs=2)
    other = instance.sequence(prompts()[1])
    results = [
        instance.run(instance.item(sequence, 5)),
        instance.run(instance.item(other, 9, (0,)), instance.item(sequence, 16)),
        instance.run(instance.item(sequence, 1, (0,))),
    ]
    entries = [entry for batch in results for result in batch for entry in result.prompt_logprobs]
    expected = eager_logits(folder_of("llama"), prompt).log_softmax(-1)
    assert [entry.token_id for entry in entries] == prompt[1:]
    for row, entry in zip(expected, entries, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert [logprob for _, logprob in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert_greedy(eager_logits(folder_of("llama"), prompts()[1]), other)
    sequence.output_ids = [results[2][0].draws[0].token_id]
    assert instance.run(instance.item(sequence, 1, (0,)))[0].prompt_logprobs == []


def test_prompt_log_probabilities_of_a_last_chunk_come_with_its_draw(instance: Instance) -> None:
    sequence = instance.sequence(prompts()[1], prompt_logprobs=0)
    (result,) = instance.run(instance.item(sequence, 9, (0,)))
    assert [entry.token_id for entry in result.prompt_logprobs] == prompts()[1][1:]
    plain = instance.sequence(prompts()[1])
    assert instance.run(instance.item(plain, 9, (0,)))[0].draws == result.draws == [Draw(result.draws[0].token_id)]


def test_a_chunk_that_draws_nothing_needs_no_logits(instance: Instance) -> None:
    assert instance.run(instance.item(instance.sequence(prompts()[2]), 8)) == [ItemResult()]


def test_damaged_kv_gives_no_token(instance: Instance) -> None:
    sequence = instance.sequence(prompts()[1])
    instance.run(instance.item(sequence, 8))
    instance.pool[:] = b"\xff" * len(instance.pool)
    (result,) = instance.run(instance.item(sequence, 1, (0,)))
    assert result.draws == [Draw(NO_TOKEN)]
