"""The steps that an instance has made: their totals, and what each took, for whoever learns from it."""

from collections.abc import Sequence

from flowkv.cost import LearntCost, prefill_pairs
from flowkv.engine.batch import Batch, BatchResult
from flowkv.messages import StepSample


class StepLog:
    """Samples are kept until they are taken; `cost`, if there is one, learns each as it is complete.

    Sums are made step by step, so that repeated steps (`Batch.num_repeats`) leave the very same ones as single steps.
    """

    def __init__(self, cost: LearntCost | None = None) -> None:
        self.num_steps = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.seconds = 0.0
        self.forward_seconds = 0.0
        self.sampling_seconds = 0.0
        self._cost = cost
        self._samples: list[StepSample] = []
        # the last steps that only decoded, as long as their number of choices is the same
        self._num_open = 0
        self._open_choices = 0  # of each
        self._open_context_tokens = 0  # of all
        self._open_seconds = 0.0

    def add(self, batch: Batch, result: BatchResult, step_seconds: Sequence[float]) -> bool:
        """Whether any of it was prefill."""
        num_decodes = context_tokens = num_tokens = num_pairs = 0
        for item in batch.items:
            if item.sequence.is_decoding:
                num_decodes += 1
                context_tokens += item.start + 1
            else:
                num_tokens += item.num_tokens
                num_pairs += prefill_pairs(item.start, item.num_tokens)
        self.num_steps += result.num_steps
        self.prefill_tokens += num_tokens
        self.decode_tokens += num_decodes * result.num_steps
        self.forward_seconds += result.forward_seconds
        self.sampling_seconds += result.sampling_seconds
        for seconds in step_seconds:
            self.seconds += seconds
        if num_tokens == 0:
            self._add_decodes(num_decodes, context_tokens, step_seconds)
            return False
        self._close()
        self._keep(StepSample(num_tokens, num_pairs, num_decodes, context_tokens, step_seconds[0]))
        return True

    def take(self) -> list[StepSample]:
        """All since the last call."""
        self._close()
        samples, self._samples = self._samples, []
        return samples

    def _add_decodes(self, num_choices: int, context_tokens: int, step_seconds: Sequence[float]) -> None:
        if num_choices != self._open_choices:
            self._close()
        num_steps = len(step_seconds)
        self._open_choices = num_choices
        self._num_open += num_steps
        self._open_context_tokens += num_steps * context_tokens + num_choices * num_steps * (num_steps - 1) // 2
        for seconds in step_seconds:
            self._open_seconds += seconds

    def _close(self) -> None:
        if self._num_open:
            num_choices = self._open_choices * self._num_open
            self._keep(
                StepSample(0, 0, num_choices, self._open_context_tokens, self._open_seconds, self._num_open)
            )  # fmt: skip
        self._num_open = self._open_context_tokens = 0
        self._open_seconds = 0.0

    def _keep(self, sample: StepSample) -> None:
        self._samples.append(sample)
        if self._cost is not None:
            self._cost.learn_step(sample)
