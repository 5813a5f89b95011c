"""How fast one mixed instance decodes a batch, beside `transformers`' own continuous batching (`generate_batch`).

Both keep the same model in a process of their own, with one thread, and take turns round by round. A round is a batch
of prompts sent at once. The figure is output tokens a second while the batch is full: from the moment every choice has
its first token to the moment the first one ends, so that prefill and set-up count on neither side. FlowKV is measured
through HTTP, at the client. What its steps spend beside forward pass and sampling is read from `/metrics`.
"""

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import httpx
from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.report import print_table, write_report
from benchmarks.scrape import difference, settled_counters
from benchmarks.spawn import ServerProcess, exit_on_sigterm
from flowkv.bundled import MODEL_FOLDER
from flowkv.sim.figures import server_figures


@dataclass(frozen=True, slots=True)
class Load:
    batch: int
    prompt_tokens: int
    output_tokens: int

    def prompts(self, seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randrange(5, 1000) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


@dataclass(frozen=True, slots=True)
class Round:
    """`full_rate` is in output tokens a second while the batch was full; `whole_rate` over the whole call."""

    full_rate: float
    whole_rate: float


def rates(times_s: list[list[float]], started_s: float) -> Round:
    """From the moment each token of each choice came."""
    all_run_s, first_end_s = max(choice[0] for choice in times_s), min(choice[-1] for choice in times_s)
    inside = sum(all_run_s < token_s <= first_end_s for choice in times_s for token_s in choice)
    if first_end_s <= all_run_s:
        raise BenchmarkError("the batch was never full: ask for more output tokens")
    total = sum(map(len, times_s))
    whole_s = max(choice[-1] for choice in times_s) - started_s
    return Round(inside / (first_end_s - all_run_s), total / whole_s)


def flowkv_round(client: httpx.Client, load: Load, seed: int) -> Round:
    body = {
        "prompt": load.prompts(seed), "max_tokens": load.output_tokens, "min_tokens": load.output_tokens,
        "ignore_eos": True, "temperature": 0, "stream": True,
    }  # fmt: skip
    times_s: list[list[float]] = [[] for _ in range(load.batch)]
    started_s = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                times_s[choice["index"]].append(time.perf_counter())
    return rates(times_s, started_s)


# --- the other side, in a process of its own: a line in (load and seed), a line out (a round) ------------------------


def transformers_side(model_folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, attn_implementation="sdpa")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        load = Load(**order["load"])
        generation = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=load.output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )  # fmt: skip
        batching = ContinuousBatchingConfig(
            page_size=32,
            num_blocks=2 * load.batch * (-(-(load.prompt_tokens + load.output_tokens) // 32)),
            max_batch_tokens=max(512, load.batch * load.prompt_tokens),
            use_cuda_graph=False,
        )
        started_s = time.perf_counter()
        outputs = model.generate_batch(
            load.prompts(order["seed"]), generation, batching, record_timestamps=True, warmup=False
        )  # fmt: skip
        times_s = [output.timestamps or [] for output in outputs.values()]
        if any(len(output.generated_tokens) != load.output_tokens for output in outputs.values()):
            raise BenchmarkError("generate_batch did not make as many tokens as asked for")
        print(json.dumps(asdict(rates(times_s, started_s))), flush=True)


class TransformersSide:
    def __init__(self, model_folder: Path, dtype: str, log: IO[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.decode", "--side", "--model", str(model_folder), "--dtype", dtype]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )  # fmt: skip
        self._read("ready")

    def round(self, load: Load, seed: int) -> Round:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"load": asdict(load), "seed": seed}) + "\n")
        self._process.stdin.flush()
        return Round(**json.loads(self._read("{")))

    def close(self) -> None:
        self._process.communicate(timeout=60.0)

    def _read(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise BenchmarkError(f"the transformers side ended (code {self._process.wait()}); see results/decode-peer.log")


@contextlib.contextmanager
def transformers_process(model_folder: Path, dtype: str) -> Iterator[TransformersSide]:
    Path("results").mkdir(exist_ok=True)
    with Path("results/decode-peer.log").open("w") as log:
        side = TransformersSide(model_folder, dtype, log)
        try:
            yield side
        finally:
            side.close()


# --- both --------------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> dict[str, Any]:
    load = Load(args.batch, args.prompt_tokens, args.output_tokens)
    model = [] if args.model == MODEL_FOLDER else [str(args.model)]
    serve = [*model, "--mixed", "1", "--threads", "1", "--dtype", args.dtype]
    ours: list[Round] = []
    theirs: list[Round] = []
    with (
        transformers_process(args.model, args.dtype) as peer,
        ServerProcess(serve, Path("results/decode-server.log")) as url,
        httpx.Client(base_url=url, timeout=300.0) as client,
    ):
        flowkv_round(client, load, 0)  # first touch and compilation on neither side's account
        peer.round(load, 0)
        before = settled_counters(url)
        for seed in range(1, args.rounds + 1):
            ours.append(flowkv_round(client, load, seed))
            theirs.append(peer.round(load, seed))
            print(f"round {seed}: {ours[-1].full_rate:.0f} against {theirs[-1].full_rate:.0f} tokens/s", flush=True)
        figures = server_figures(difference(before, settled_counters(url)))
    return {
        "load": asdict(load),
        "dtype": args.dtype,
        "flowkv": [asdict(r) for r in ours],
        "generate_batch": [asdict(r) for r in theirs],
        "ratio_full": statistics.median(a.full_rate / b.full_rate for a, b in zip(ours, theirs, strict=True)),
        "ratio_whole": statistics.median(a.whole_rate / b.whole_rate for a, b in zip(ours, theirs, strict=True)),
        "server": figures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="model folder (default: the bundled one)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/decode.json"))
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        transformers_side(args.model, args.dtype)
        return 0
    exit_on_sigterm()
    results = compare(args)
    rows = [
        (name, f"{statistics.median(r['full_rate'] for r in results[name]):.0f}",
         f"{statistics.median(r['whole_rate'] for r in results[name]):.0f}")
        for name in ("flowkv", "generate_batch")
    ]  # fmt: skip
    rows.append(("ratio, median of pairs", f"{results['ratio_full']:.2f}", f"{results['ratio_whole']:.2f}"))
    title = f"output tokens/s, batch {args.batch}, {args.dtype}"
    print_table(Console(), ("", "batch full", "whole call"), rows, title)
    overhead = results["server"]["step_overhead_fraction"]
    print(f"scheduling and messages: {overhead:.1%} of a step (sampling not counted in)")
    write_report(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
