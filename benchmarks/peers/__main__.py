"""FlowKV and other engines under the same load, taking turns round by round.

    python -m benchmarks.peers aggregated --peer vllm-compiled --batch 1 8 16
    python -m benchmarks.peers pd --peer vllm-eager --prompt-tokens 512 2048

A round is a batch of requests sent at once, with prompts that nobody has seen; the figure is output tokens a second
over the whole call, prefill included. A peer is installed into an environment of its own at first.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.decode import Load
from benchmarks.peers import llamacpp, vllm
from benchmarks.peers.model import ensure_model
from benchmarks.peers.ours import flowkv, generate_batch
from benchmarks.peers.summary import print_comparison, summarize
from benchmarks.peers.turns import Contestant, Sample, Stage, order, samples
from benchmarks.report import ROOT, write_report
from benchmarks.spawn import exit_on_sigterm

PEERS = {
    "aggregated": ("vllm-compiled", "vllm-eager", "generate_batch", "llamacpp"),
    "pd": ("vllm-compiled", "vllm-eager"),
}
_FLOWKV = {"aggregated": "--mixed 1 --threads 1", "pd": "--prefill 1 --decode 1 --threads 1"}
_BATCH = {"aggregated": [1, 8, 16], "pd": [8]}
_PROMPT_TOKENS = {"aggregated": [128], "pd": [512, 2048]}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PEERS))
    parser.add_argument("--peer", nargs="+", help="default: all of the part")
    parser.add_argument("--flowkv", metavar="ARGS", help="options of `flowkv serve MODEL`")
    parser.add_argument("--as-shipped", action="store_true", help="vLLM's P and D without the two corrections")
    parser.add_argument("--peer-env", action="append", default=[], metavar="NAME=VALUE", help="for vLLM's servers")
    parser.add_argument(
        "--together", action=argparse.BooleanOptionalAction, help="both stay up (default: aggregated yes, pd no)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--batch", type=_positive, nargs="+")
    load.add_argument("--prompt-tokens", type=_positive, nargs="+")
    load.add_argument("--output-tokens", type=_positive, default=64)
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "peers.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "peers", help="environments, model and logs")
    return _completed(parser, parser.parse_args(arguments))


def _completed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    args.peer = args.peer or list(PEERS[args.part])
    if unknown := set(args.peer) - set(PEERS[args.part]):
        parser.error(f"{args.part} has no peer {', '.join(sorted(unknown))}; it has {', '.join(PEERS[args.part])}")
    if wrong := [text for text in args.peer_env if "=" not in text]:
        parser.error(f"--peer-env {wrong[0]} is not NAME=VALUE")
    args.flowkv = args.flowkv or _FLOWKV[args.part]
    args.batch = args.batch or _BATCH[args.part]
    args.prompt_tokens = args.prompt_tokens or _PROMPT_TOKENS[args.part]
    args.together = args.part == "aggregated" if args.together is None else args.together
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def contestant(name: str, args: argparse.Namespace, model: Path, console: Console) -> Contestant:
    if name == "generate_batch":
        return generate_batch(model, args.folder)
    if name == "llamacpp":
        return llamacpp.contestant(model, args.folder / "llamacpp", console.print)
    variables = dict(text.split("=", 1) for text in args.peer_env)
    peer = vllm.Vllm(args.folder / "vllm", model, name == "vllm-compiled", variables)
    if args.part == "pd":
        return vllm.disaggregated(peer, args.as_shipped, console.print)
    return vllm.aggregated(peer, console.print)


def compare(
    pair: tuple[Contestant, Contestant], loads: Sequence[Load], args: argparse.Namespace, console: Console
) -> Iterator[dict[str, Any]]:
    """The comparison as far as it has come, after each turn."""
    names = (pair[0].name, pair[1].name)
    played: list[Sample] = []
    with Stage(pair, loads, args.together) as stage:
        for sample in samples(stage, pair, loads, order(args.rounds, len(loads), args.together)):
            played.append(sample)
            _say(console, sample)
            yield {
                "names": names,
                "settings": {contestant.name: contestant.settings for contestant in pair},
                "together": args.together,
                "idle_core_fraction": stage.idle_core_fraction,
                "loads": summarize(names, played),
            }


def _say(console: Console, sample: Sample) -> None:
    load = sample.load
    what = f"round {sample.round + 1}, {load.batch} x {load.prompt_tokens}/{load.output_tokens}"
    console.print(f"{what}: {sample.contestant} {sample.figures.tokens_per_s:.0f} tokens/s", highlight=False)


def run(args: argparse.Namespace, console: Console) -> None:
    model = ensure_model(args.folder / "model")
    sizes = product(args.batch, args.prompt_tokens)
    loads = [Load(batch, num_prompt, args.output_tokens) for batch, num_prompt in sizes]
    comparisons: list[dict[str, Any]] = []
    for name in args.peer:
        pair = (flowkv(model, args.flowkv, args.folder), contestant(name, args, model, console))
        for comparison in compare(pair, loads, args, console):
            write_report(args.output, {"part": args.part, "comparisons": [*comparisons, comparison]})
        comparisons.append(comparison)
        print_comparison(console, comparison["names"], comparison["loads"])
    console.print(f"wrote {args.output}", highlight=False, soft_wrap=True)


def main() -> None:
    exit_on_sigterm()
    args = parse_arguments()
    try:
        run(args, Console() if sys.stdout.isatty() else Console(width=140))
    except BenchmarkError as error:
        sys.exit(f"benchmarks.peers: {error}")


if __name__ == "__main__":
    main()
