"""What came of a step: sequences advance, and tokens go out."""

from msgspec.structs import replace

from flowkv.engine.batch import Batch, BatchItem, BatchResult, Draw, ItemResult
from flowkv.engine.handoff_sender import HandoffSender
from flowkv.engine.requests import Requests
from flowkv.engine.sequence import Sequence
from flowkv.types import GRAMMAR_ENDED, NO_TOKEN, NO_WAY, FinishReason, Output, Timings, TokenLogprobs

_NO_TOKEN_TEXTS = {
    NO_TOKEN: "no token could be drawn: the logits were NaN or infinite, or min_tokens or logit_bias left none",
    NO_WAY: GRAMMAR_ENDED,
}


class Results:
    """Applies results to the sequences of `requests`; `sender` hears of every chunk and takes what it hands over."""

    def __init__(self, requests: Requests, sender: HandoffSender) -> None:
        self._requests = requests
        self._sender = sender

    def apply(self, batch: Batch, result: BatchResult, began_s: float, now_s: float) -> dict[str, list[Output]]:
        """What goes out, by the address of its frontend; the batch was computed from `began_s` on."""
        outputs: dict[str, list[Output]] = {}
        for item, item_result in zip(batch.items, result.items, strict=True):
            sequence = item.sequence
            if sequence.is_over:
                continue
            if sequence.is_decoding:
                sequence.num_computed = item.start + result.num_steps
                output = _append(sequence, sequence.choice, sequence.output_ids, item_result.draws)
                if sequence.stamps.decoding_s is None:
                    output = replace(output, timings=sequence.stamps.first_decoded(began_s, now_s))
                elif output.finish_reason is not None:
                    output = replace(output, timings=sequence.stamps.last_decoded(now_s))
                outputs.setdefault(sequence.frontend_address, []).append(output)
                if output.finish_reason is not None:
                    self._requests.end(sequence)
            else:
                self._apply_chunk(item, item_result, outputs, now_s)
        return outputs

    def _apply_chunk(
        self, item: BatchItem, result: ItemResult, outputs: dict[str, list[Output]], now_s: float
    ) -> None:  # fmt: skip
        sequence = item.sequence
        sequence.num_computed = item.stop
        sequence.prompt_logprobs += result.prompt_logprobs
        if sequence.num_uncomputed:
            self._sender.chunk_computed(sequence)
            return
        mine = outputs.setdefault(sequence.frontend_address, [])
        timings = sequence.stamps.computed(now_s)
        choices: dict[int, list[int]] = {}
        for choice, draw in zip(item.draws, result.draws, strict=True):
            output_ids = list(sequence.output_ids)
            output = replace(_append(sequence, choice, output_ids, [draw]), timings=timings)
            mine.append(output)
            if output.finish_reason is None:
                choices[choice] = output_ids
        if not item.draws:  # max_tokens is 0: the prompt was all there was to compute
            mine.extend(_empty_output(sequence, choice, timings) for choice in range(sequence.num_choices))
        self._move_on(sequence, choices, len(item.draws), now_s)

    def _move_on(self, sequence: Sequence, choices: dict[int, list[int]], num_draws: int, now_s: float) -> None:
        """A prompt (and what a preempted choice had put out) is computed: `choices` run on, here or elsewhere."""
        if not choices:
            self._sender.takes(sequence, choices, now_s)
            self._requests.end(sequence, num_draws)
            return
        self._requests.take_out(sequence)
        if not self._sender.takes(sequence, choices, now_s):
            self._requests.decode(sequence, choices)


def _append(sequence: Sequence, choice: int, output_ids: list[int], draws: list[Draw]) -> Output:
    """Add drawn tokens to a choice, one for each step, and say what the client gets. None but the last may end it."""
    request = sequence.request
    index = len(output_ids)
    token_ids = [draw.token_id for draw in draws]
    finish_reason, stop_token_id, error = None, None, None
    if token_ids[-1] < 0:
        finish_reason, error = FinishReason.ERROR, _NO_TOKEN_TEXTS[token_ids.pop()]
    elif token_ids[-1] in request.sampling.stop_token_ids:
        finish_reason, stop_token_id = FinishReason.STOP, token_ids[-1]
    elif index + len(token_ids) >= request.sampling.max_tokens:
        finish_reason = FinishReason.LENGTH
    output_ids += token_ids
    logprobs = None if draws[0].logprobs is None else [draw.logprobs for draw in draws if draw.logprobs is not None]
    return Output(
        request.request_id,
        choice,
        index,
        token_ids,
        finish_reason,
        stop_token_id,
        logprobs,
        _prompt_logprobs(sequence) if index == 0 and choice == 0 else None,
        error,
    )


def _empty_output(sequence: Sequence, choice: int, timings: Timings) -> Output:
    logprobs = _prompt_logprobs(sequence) if choice == 0 else None
    request_id = sequence.request.request_id
    return Output(request_id, choice, 0, [], FinishReason.LENGTH, prompt_logprobs=logprobs, timings=timings)


def _prompt_logprobs(sequence: Sequence) -> list[TokenLogprobs] | None:
    return None if sequence.request.sampling.prompt_logprobs is None else sequence.prompt_logprobs
