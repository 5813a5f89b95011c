"""What a grammar costs a step of eight choices: its masks, and the draw from what they leave, beside the step itself.

    python -m benchmarks.grammar

Eight choices, each at its own place in the grammar, are drawn together from random logits, which is hard on a grammar:
no model writes so many odd strings. `masks` is the time to bring eight matchers up to the last token and to have their
masks; `draw` what drawing by them takes; `plain` what the same draw takes without a grammar. The bundled model's step
is one of its own, made and timed as an instance does; the larger vocabulary is made up, and has no model.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from llguidance import LLTokenizer, TokenizerWrapper
from rich.console import Console

from benchmarks.report import ROOT, print_table, summarize, write_report
from flowkv.bundled import MODEL_FOLDER
from flowkv.engine.batch import Batch, BatchItem
from flowkv.engine.runner import TorchRunner
from flowkv.engine.sequence import Sequence
from flowkv.grammar.compiler import compile_grammar
from flowkv.grammar.matchers import Matchers
from flowkv.grammar.vocabulary import Vocabulary
from flowkv.model.loading import load_model
from flowkv.model.sampler import DrawSpec, sample
from flowkv.server.reasoning.lead import thought_lead
from flowkv.server.reasoning.thought_format import FORMATS
from flowkv.types import NO_TOKEN, Grammar, GrammarKind, Request, SamplingParams

NUM_CHOICES = 8
LARGE = 128_000  # tokens
LETTERS = "etaoinshrdlu" * 4 + 'cmfwypvbgkjqxz0123456789_",.:{}'
CONTEXT, BLOCK_SIZE = 256, 16
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "mail": {"type": "string", "pattern": "^[a-z.]+@[a-z]+\\.[a-z]{2,3}$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "string"}}},
    },
    "required": ["name", "age", "mail", "tags", "address"],
}
VALUES = {"enum": [f"value {i}" for i in range(4000)]}
GRAMMARS = {
    "any object": Grammar(kind=GrammarKind.JSON_OBJECT),
    "schema": Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(PERSON)),
    "regex": Grammar(kind=GrammarKind.REGEX, text=r"([A-Z][a-z]+ ){3,40}[0-9]{4}"),
    "4,000 values": Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(VALUES)),
    "thought, then the schema": Grammar(
        kind=GrammarKind.JSON_SCHEMA,
        text=json.dumps(PERSON),
        lead=thought_lead(FORMATS["think"], lambda marker: False, is_open=True),
    ),
}


class _Words:
    """A vocabulary of bytes, and of made-up words with and without a space before them; its last token ends."""

    bos_token_id = None

    def __init__(self, size: int) -> None:
        rng = random.Random(1)
        words: dict[bytes, None] = {bytes([byte]): None for byte in range(256)}
        while len(words) < size - 1:
            word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 9)))
            words[(rng.choice(["", " "]) + rng.choice([word, word.capitalize()])).encode()] = None
        self.tokens = [*words, b"<|end|>"]
        self.eos_token_id = size - 1
        self.special_token_ids = [size - 1]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def request_of(number: int, grammar: Grammar | None, end_ids: frozenset[int], num_prompt: int = 1) -> Request:
    sampling = SamplingParams(max_tokens=10**6, grammar=grammar, seed=number, stop_token_ids=end_ids)
    return Request(request_id=f"r{number}", prompt_ids=[5] * num_prompt, sampling=sampling)


def put_out(output_ids: list[int], token_id: int, end_ids: frozenset[int]) -> None:
    """A choice that ends begins anew."""
    if token_id in end_ids or token_id == NO_TOKEN:
        output_ids.clear()
    else:
        output_ids.append(token_id)


def steps(vocabulary: Vocabulary, grammar: Grammar, num_steps: int) -> Iterator[tuple[float, float, float]]:
    """Seconds of the masks, of the draw, of the draw without them."""
    size = vocabulary.tokens.vocab_size
    matchers = Matchers(vocabulary, NUM_CHOICES)
    generator = torch.Generator().manual_seed(1)
    requests = [request_of(i, grammar, vocabulary.end_ids) for i in range(NUM_CHOICES)]
    outputs: list[list[int]] = [[] for _ in requests]
    for _ in range(num_steps):
        logits = torch.randn(NUM_CHOICES, size, generator=generator) * 4
        began_s = time.perf_counter()
        masks = [matchers.allowed(request, 0, ids) for request, ids in zip(requests, outputs, strict=True)]
        masked_s = time.perf_counter()
        specs = [DrawSpec(i, requests[i].sampling, 0, [5], outputs[i], masks[i]) for i in range(NUM_CHOICES)]
        drawn = sample(logits, specs)
        drawn_s = time.perf_counter()
        sample(logits, [DrawSpec(i, requests[i].sampling, 0, [5], outputs[i]) for i in range(NUM_CHOICES)])
        yield masked_s - began_s, drawn_s - masked_s, time.perf_counter() - drawn_s
        for ids, (token_id, _) in zip(outputs, drawn, strict=True):
            put_out(ids, token_id, vocabulary.end_ids)


def measure(name: str, vocabulary: Vocabulary, num_steps: int) -> list[dict[str, Any]]:
    found = []
    for kind, grammar in GRAMMARS.items():
        began_s = time.perf_counter()
        compile_grammar(grammar, vocabulary)
        compile_s = time.perf_counter() - began_s
        masks, draw, plain = zip(*steps(vocabulary, grammar, num_steps), strict=True)
        found.append(
            {"vocabulary": name, "tokens": vocabulary.tokens.vocab_size, "grammar": kind, "compile_s": compile_s,
             "masks_s": summarize(masks), "draw_s": summarize(draw), "plain_s": summarize(plain)}
        )  # fmt: skip
    return found


def model_steps(num_steps: int, grammar: Grammar | None) -> dict[str, Any]:
    """Decode steps of the bundled model at some hundreds of tokens, by the clocks of its runner."""
    loaded = load_model(MODEL_FOLDER, "auto")
    layout = loaded.layout(BLOCK_SIZE)
    num_blocks = NUM_CHOICES * layout.num_blocks_for(CONTEXT + num_steps)
    vocabulary = Vocabulary.of_folder(MODEL_FOLDER, loaded.vocab_size)
    pool = memoryview(bytearray(num_blocks * layout.block_bytes))
    runner = TorchRunner(loaded, layout, pool, num_blocks, Matchers(vocabulary, NUM_CHOICES))
    sequences = []
    for i in range(NUM_CHOICES):
        request = request_of(i, grammar, vocabulary.end_ids, CONTEXT)
        sequence = Sequence(request=request, frontend_address="", arrival=i)
        sequence.block_table = list(range(i, num_blocks, NUM_CHOICES))
        sequences.append(sequence)
    forward_s, sampling_s = [], []
    for step in range(num_steps):
        result = runner.run(Batch(step, tuple(BatchItem(s, s.num_tokens - 1, 1, (0,)) for s in sequences)))
        forward_s.append(result.forward_seconds)
        sampling_s.append(result.sampling_seconds)
        for sequence, item in zip(sequences, result.items, strict=True):
            put_out(sequence.output_ids, item.draws[0].token_id, vocabulary.end_ids)
    return {"forward_s": summarize(forward_s), "sampling_s": summarize(sampling_s)}


def print_results(results: list[dict[str, Any]], model: dict[str, dict[str, Any]]) -> None:
    console = Console()
    rows = [
        (
            f"{one['vocabulary']}, {one['grammar']}", f"{1e3 * one['compile_s']:.1f}",
            *(f"{1e6 * one['masks_s'][point]:.0f}" for point in ("p50", "mean", "p99")),
            *(f"{1e6 * one[kind]['p50']:.0f}" for kind in ("draw_s", "plain_s")),
        )
        for one in results
    ]  # fmt: skip
    header = ("vocabulary, grammar", "compile\nms", "masks\np50 us", "\nmean", "\np99", "draw\np50 us", "plain\np50 us")
    print_table(console, header, rows, f"{NUM_CHOICES} choices, from random logits")
    times = [
        (name, *(f"{1e6 * one[kind]['p50']:.0f}" for kind in ("forward_s", "sampling_s")))
        for name, one in model.items()
    ]
    print_table(console, ("grammar", "forward\np50 us", "sampling\np50 us"), times, "the bundled model")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammar", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "grammar.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    large = Vocabulary(LLTokenizer(TokenizerWrapper(_Words(LARGE))))
    large_s = time.perf_counter() - began_s
    bundled = Vocabulary.of_folder(MODEL_FOLDER, 0)
    results = [*measure("bundled", bundled, args.steps), *measure("large", large, args.steps)]
    model = {name: model_steps(args.steps, GRAMMARS.get(name)) for name in ("none", "schema")}
    print_results(results, model)
    report = {"steps": args.steps, "large_vocabulary_s": large_s, "grammars": results, "bundled_model": model}
    write_report(args.output, report)


if __name__ == "__main__":
    main()
