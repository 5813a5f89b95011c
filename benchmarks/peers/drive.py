"""One round: a batch of requests at once to one OpenAI server, and what its client saw."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import BenchmarkError
from benchmarks.client import Answer, Client, gaps_s
from benchmarks.decode import Load
from benchmarks.serve import served_model


@dataclass(frozen=True, slots=True)
class Figures:
    """`tokens_per_s` is of output tokens over the whole call, prefill included; TTFT and ITL are medians.

    What a peer without a stream cannot show is None.
    """

    tokens_per_s: float
    ttft_s: float | None = None
    itl_s: float | None = None
    tokens_per_event: float | None = None
    client_core_fraction: float | None = None


def drive(url: str, load: Load, seed: int) -> Figures:
    """Send the whole batch at once. Raises BenchmarkError where an answer fails or has another length."""
    client = Client(url)
    model, _ = served_model(url)
    requests = [client.encode("/v1/completions", body(model, prompt, load)) for prompt in load.prompts(seed)]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    answers = asyncio.run(_send_all(client, requests))
    cpu_s, duration_s = time.process_time() - start_cpu_s, time.perf_counter() - start_s
    check(answers, load)
    return figures(answers, start_s, cpu_s / duration_s)


def body(model: str, prompt: list[int], load: Load) -> dict[str, object]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.output_tokens,
        "min_tokens": load.output_tokens,
        "ignore_eos": True,
        "skip_special_tokens": False,  # a token that shows no text would bring no event
        "temperature": 0.0,
    }


async def _send_all(client: Client, requests: Sequence[bytes]) -> list[Answer]:
    return await asyncio.gather(*map(client.send, requests))


def check(answers: Sequence[Answer], load: Load) -> None:
    for answer in answers:
        if answer.error is not None:
            raise BenchmarkError(f"a request failed: {answer.error}")
        lengths = (answer.num_prompt_tokens, answer.num_output_tokens)
        if lengths != (load.prompt_tokens, load.output_tokens) or not answer.event_s:
            raise BenchmarkError(
                f"asked for {load.prompt_tokens}/{load.output_tokens} tokens, the server counts {lengths}"
            )


def figures(answers: Sequence[Answer], start_s: float, client_core_fraction: float) -> Figures:
    """Of whole answers; the call ends when the last text comes."""
    num_tokens = sum(answer.num_output_tokens for answer in answers)
    gaps = gaps_s(answers)
    return Figures(
        tokens_per_s=num_tokens / (max(answer.event_s[-1] for answer in answers) - start_s),
        ttft_s=statistics.median(answer.event_s[0] - answer.sent_s for answer in answers),
        itl_s=statistics.median(gaps) if gaps else None,
        tokens_per_event=num_tokens / sum(len(answer.event_s) for answer in answers),
        client_core_fraction=client_core_fraction,
    )
