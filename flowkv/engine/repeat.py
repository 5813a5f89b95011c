"""Steps that only decode, several at a stretch: how many can be foreseen, and how a `Runner` makes them."""

from collections.abc import Iterable
from dataclasses import replace

from flowkv.engine.batch import Batch, BatchItem, BatchResult, Draw, ItemResult, Runner
from flowkv.engine.sequence import Sequence


def foreseen_steps(items: Iterable[BatchItem], most: int) -> int:
    """Steps until the first of these decodes ends, at most `most`; 1 where one may end with any token."""
    for item in items:
        sampling = item.sequence.request.sampling
        if sampling.stop_token_ids:  # a grammar ends with one of them
            return 1
        most = min(most, sampling.max_tokens - len(item.sequence.output_ids))
    return most


def run_repeats(runner: Runner, batch: Batch) -> BatchResult:
    """All repetitions of a batch, each token drawn being what the next step computes; fewer if one cannot be drawn.

    (Multi-step scheduling, as of vLLM 0.6: between the steps nobody looks up, so tokens come in bursts.)
    """
    if batch.num_repeats == 1:
        return runner.run(batch)
    shadows = [replace(item.sequence, output_ids=list(item.sequence.output_ids)) for item in batch.items]
    draws: list[list[Draw]] = [[] for _ in shadows]
    copies, num_steps = batch.copies, 0
    forward_seconds = sampling_seconds = 0.0
    while num_steps < batch.num_repeats and not any(drawn and drawn[-1].token_id < 0 for drawn in draws):
        result = runner.run(Batch(batch.batch_id, _step(batch, shadows, num_steps), copies))
        copies, num_steps = (), num_steps + 1
        forward_seconds += result.forward_seconds
        sampling_seconds += result.sampling_seconds
        for shadow, drawn, item_result in zip(shadows, draws, result.items, strict=True):
            drawn.append(item_result.draws[0])
            shadow.output_ids.append(drawn[-1].token_id)
    items = [ItemResult(drawn) for drawn in draws]
    return BatchResult(batch.batch_id, items, forward_seconds, sampling_seconds, num_steps)


def _step(batch: Batch, shadows: list[Sequence], index: int) -> tuple[BatchItem, ...]:
    """The items of one repetition. `shadows` have the tokens drawn so far, which the engine does not know yet."""
    return tuple(
        BatchItem(shadow, item.start + index, 1, item.draws)
        for item, shadow in zip(batch.items, shadows, strict=True)
    )  # fmt: skip
