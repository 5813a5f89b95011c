"""`make demo`: one prefill and one decode instance on the bundled model, eight prompts at once, and what they cost.

Six prompts are recall conversations: facts, several hundred tokens of Shakespeare, and a question whose answer stands
only in the KV cache that crossed from one instance to the other. Two are passages to go on with; one of these is shown
as it comes.
"""

import argparse
import asyncio
import gzip
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from benchmarks import BenchmarkError, scrape
from benchmarks.client import Answer, Client, run_of
from benchmarks.report import ROOT, percentile, write_report
from benchmarks.spawn import ServerProcess, exit_on_sigterm
from flowkv.bundled.recall import recall_task
from flowkv.sim.figures import Slo, figures, server_figures

TEXT_FILE = ROOT / "training" / "tinyshakespeare.txt.gz"
NUM_RECALL = 6
FILLER_CHARACTERS = 2600  # some 1,100 tokens of the bundled tokenizer: the prompt takes several chunks
PASSAGE_CHARACTERS = 2600
ANSWER_TOKENS = 160


@dataclass(frozen=True, slots=True)
class Prompt:
    """`expected` is the answer to a recall question; None for a passage, which has no right continuation."""

    path: str
    body: dict[str, object]
    shown: str  # the question, or the last line of the passage
    expected: str | None = None


def make_prompts(text: str, seed: int) -> list[Prompt]:
    """Two passages, the first of which is shown, and then the recall conversations."""
    rng = random.Random(f"demo/{seed}")
    return [*(_passage(rng, text, seed) for _ in range(2)), *(_recall(rng, text) for _ in range(NUM_RECALL))]


def _recall(rng: random.Random, text: str) -> Prompt:
    task = recall_task(rng, _whole_lines(rng, text, FILLER_CHARACTERS))
    question = task.messages[-1]["content"].rpartition("\n")[2]
    body = {"messages": list(task.messages), "max_tokens": 16, "temperature": 0.0}
    return Prompt("/v1/chat/completions", body, question, task.answer)


def _passage(rng: random.Random, text: str, seed: int) -> Prompt:
    passage = _whole_lines(rng, text, PASSAGE_CHARACTERS).rpartition("\n\n")[0]
    speaker = rng.choice(["ROMEO:", "JULIET:", "GLOUCESTER:", "KING RICHARD III:"])
    prompt = f"{passage}\n\n{speaker}\n"
    body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0.7, "top_p": 0.9, "seed": seed}
    return Prompt("/v1/completions", body, speaker)


def _whole_lines(rng: random.Random, text: str, num_characters: int) -> str:
    start = text.index("\n", rng.randrange(len(text) - 2 * num_characters)) + 1
    return text[start : text.index("\n", start + num_characters) + 1]


async def ask_all(url: str, prompts: Sequence[Prompt], seconds: float) -> tuple[list[Answer], float]:
    """Every answer, and the seconds until the last had ended. The first is written to the terminal as it comes."""
    client = Client(url, seconds)
    encoded = [client.encode(prompt.path, prompt.body) for prompt in prompts]
    start_s = time.perf_counter()
    shown, *others = encoded
    answers = await asyncio.gather(client.send(shown, _write), *map(client.send, others))
    return answers, time.perf_counter() - start_s


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def show_recall(console: Console, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
    console.rule("recall: facts that stand only in the KV cache that crossed", align="left")
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt.expected is not None:
            text = " ".join(answer.text.split())
            verdict = "right" if text == prompt.expected else f"wrong: {prompt.expected}"
            console.print(f"{prompt.shown:<18} {text:<24.24} {verdict}", highlight=False, markup=False)


def figure_rows(
    answers: Sequence[Answer], duration_s: float, summary: dict[str, Any], server: dict[str, float]
) -> list[list[str]]:
    """The rows of the closing table. Raises BenchmarkError where no KV has crossed."""
    if not server.get("transfers") or "transfer_bytes_per_s" not in server:
        raise BenchmarkError("no KV was handed from the prefill to the decode instance")
    itl_s = [gap for answer in answers for gap in answer.itl_s]
    ttft = summary["ttft_s"]
    return [
        ["prompts", f"{len(answers)}", f"{summary['prompt_tokens']} tokens"],
        ["TTFT", f"{ttft['p50'] * 1e3:.0f} ms", f"median; at most {ttft['max'] * 1e3:.0f} ms"],
        ["ITL", f"{percentile(itl_s, 0.5) * 1e3:.1f} ms", f"median; p99 {percentile(itl_s, 0.99) * 1e3:.1f} ms"],
        [
            "output tokens/s",
            f"{summary['output_tokens_per_s']:.0f}",
            f"{summary['output_tokens']} tokens in {duration_s:.2f} s, prefill included",
        ],
        ["KV moved", f"{server['transfer_bytes'] / 2**20:.2f} MiB", f"{server['transfers']:.0f} requests"],
        ["in calls", f"{server['transfer_calls']:.0f}", "one for each run of consecutive blocks"],
        ["at", f"{server['transfer_bytes_per_s'] / 1e9:.2f} GB/s", "while moving"],
        ["hidden", f"{server['transfer_hidden_fraction']:.0%}", "of the transfer time, under prefill"],
    ]


def _grid(rows: Sequence[Sequence[str]]) -> Table:
    grid = Table.grid(padding=(0, 3))
    columns: tuple[JustifyMethod, ...] = ("left", "right", "left")
    for justify in columns:
        grid.add_column(justify=justify, no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return grid


def run(console: Console, seed: int, seconds: float) -> None:
    """Raises BenchmarkError for anything that went wrong, the server's end included."""
    prompts = make_prompts(gzip.decompress(TEXT_FILE.read_bytes()).decode(), seed)
    console.print("[bold]FlowKV[/bold]: one prefill instance, one decode instance, the bundled model", highlight=False)
    start_s = time.monotonic()
    with ServerProcess(["--prefill", "1", "--decode", "1", "--roles", "fixed"], log=None) as url:
        console.print(f"ready after {time.monotonic() - start_s:.1f} s at {url}", highlight=False)
        before = scrape.settled_counters(url)
        console.rule(f"{len(prompts)} prompts at once; one answer as it comes", align="left")
        console.print(prompts[0].shown, highlight=False, markup=False)
        answers, duration_s = asyncio.run(ask_all(url, prompts, seconds))
        print(flush=True)
        if errors := [answer.error for answer in answers if answer.error is not None]:
            raise BenchmarkError(f"{len(errors)} of {len(answers)} requests failed: {errors[0]}")
        show_recall(console, prompts, answers)
        summary = figures(run_of(answers, duration_s), Slo())
        server = server_figures(scrape.difference(before, scrape.settled_counters(url)))
        console.rule("figures", align="left")
        console.print(_grid(figure_rows(answers, duration_s, summary, server)))
        write_report(ROOT / "results" / "demo.json", {"client": summary, "server": server})
    console.print("stopped; no process is left. Next: .venv/bin/flowkv serve", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="other texts and other facts")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="for one answer")
    args = parser.parse_args()
    exit_on_sigterm()
    try:
        run(Console(), args.seed, args.timeout_s)
    except BenchmarkError as error:
        sys.exit(f"demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
