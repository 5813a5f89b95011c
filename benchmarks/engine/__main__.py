"""Where a step's time goes, and how much of it the machine asks for.

One instance makes steps as its process does (`flowkv.engine.process`): the engine, the runner, a KV pool, a transfer
backend and mailboxes on Unix sockets are the real ones, with clocks around their calls. Nobody else runs: messages go
to a mailbox that a thread of ZeroMQ reads. A step is split into

    forward     the model without attention, and packing the batch (with --plain, rotary positions too)
    attention   the kernel's calls: rotary positions, KV written, KV read
    sampling
    scheduling  the engine: messages handled, the next batch, its result, effects
    messages    received, encoded and sent; transfers looked after
    rest        what no clock covers, the clocks' own time included

where the layers run one by one, so that attention can be told from the rest; --one-call has them as they are served.
`idle` is the time in which the thread had no core, whichever part that fell into. A decode cell is a step of
`batch` choices with `context` tokens each, handed over as if another instance had prefilled them: their KV is random
numbers. A prefill cell is the chunk of a long prompt that begins at `context`; the last of them draws a token. The
floor is what reading weights and KV takes at the measured bandwidth, or the arithmetic at the measured matrix rate
where that is longer.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import BenchmarkError
from benchmarks.engine.cells import DECODE, Cell, OnDone, Plan, check_attention, measure_round, open_bench
from benchmarks.engine.instance import Step
from benchmarks.engine.roofline import Machine, Model
from benchmarks.engine.summary import report, show
from benchmarks.llama import make_llama
from benchmarks.report import ROOT, write_report
from flowkv.bundled import MODEL_FOLDER
from flowkv.config import EngineConfig
from flowkv.errors import FlowKVError
from flowkv.model import fused
from flowkv.model.loading import DTYPES, load_model

BATCHES, QUICK_BATCHES = (1, 2, 4, 8, 16, 32, 64), (1, 8, 16)
CONTEXTS, QUICK_CONTEXTS = (128, 512, 2048, 8192), (128, 512, 2048)
MAX_CELL_TOKENS = 140_000  # KV of one decode cell, unless --full
SHAPES = ("58m", "bundled")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a dense model")
    which.add_argument("--shape", choices=SHAPES, default=SHAPES[0], help="58m is made on the spot: benchmarks.llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", help=f"default: {BATCHES}")
    parser.add_argument("--context", type=int, nargs="+", help=f"default: {CONTEXTS}")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--plain", action="store_true", help="run the modules of transformers as they are")
    parser.add_argument(
        "--one-call", action="store_true", help="all layers in one call, as they are served: attention within forward"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each cell in each round")
    parser.add_argument("--quick", action="store_true", help="fewer cells, two rounds")
    parser.add_argument("--full", action="store_true", help=f"cells of more than {MAX_CELL_TOKENS} tokens too")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "engine.json")
    return parser.parse_args(arguments)


def plan_of(args: argparse.Namespace) -> Plan:
    """BenchmarkError for numbers that are not positive."""
    batches = args.batch or (QUICK_BATCHES if args.quick else BATCHES)
    contexts = args.context or (QUICK_CONTEXTS if args.quick else CONTEXTS)
    if min(*batches, *contexts, args.rounds, args.steps, args.threads) < 1:
        raise BenchmarkError("batches, contexts, rounds, steps and threads are at least 1")
    return Plan(
        batches=tuple(sorted(set(batches))),
        contexts=tuple(sorted(set(contexts))),
        num_rounds=2 if args.quick else args.rounds,
        num_steps=args.steps,
        max_cell_tokens=sys.maxsize if args.full else MAX_CELL_TOKENS,
    )


def model_folder(args: argparse.Namespace, scratch: Path) -> Path:
    if args.model is not None:
        return Path(args.model)
    if args.shape == "bundled":
        return MODEL_FOLDER
    folder = scratch / "llama"
    make_llama(folder)
    return folder


@contextmanager
def progress(console: Console, total: int) -> Iterator[OnDone]:
    """A bar on a terminal, nothing elsewhere; call the context's value once a decode cell or prompt."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("decode cells, prompts", total=total)
        yield lambda: bar.advance(task)


def measure(args: argparse.Namespace, scratch: Path, console: Console) -> dict[str, Any]:
    """The report, which is written after every round."""
    plan, config, folder = plan_of(args), EngineConfig(fused=not args.plain), model_folder(args, scratch)
    with patch.object(fused, "can_stack", fused.can_stack if args.one_call else lambda modules: False):
        loaded = load_model(folder, args.dtype, may_fuse=config.fused)
    cells, skipped = plan.decode_cells(loaded.max_model_tokens)
    cells += plan.prefill_cells(config.max_batch_tokens, loaded.max_model_tokens)
    if not cells:
        raise BenchmarkError("none of these cells can be measured")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    machine, model = Machine(), Model.of(folder, loaded)
    steps: dict[Cell, list[Step]] = defaultdict(list)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        bench = open_bench(stack, scratch, loaded, config, cells, plan.num_decoded)
        for number in range(plan.num_rounds):
            machine.measure([cell.size for cell in cells], DTYPES[loaded.dtype])
            num_decodes = sum(cell.phase == DECODE for cell in cells)
            with progress(console, num_decodes + (len(cells) > num_decodes) * (1 + plan.num_steps)) as on_done:
                measure_round(bench, plan, cells, number, steps, on_done)
            if not args.one_call:
                check_attention(step for measured in steps.values() for step in measured)
            results = {"options": options, **report(plan, model, machine, steps, skipped)}
            write_report(args.output, results)
            console.print(f"round {number + 1} of {plan.num_rounds} is in {args.output}", highlight=False)
    return results


def run(args: argparse.Namespace, console: Console) -> None:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(args, Path(scratch), console)
    how = "modules of transformers" if args.plain else "fused where it fits"
    show(console, results, f"{args.model or args.shape}, {args.dtype}, {how}, {args.threads} thread(s)")


def main() -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    try:
        run(parse_arguments(), console)
    except (BenchmarkError, FlowKVError) as error:
        sys.exit(f"benchmarks.engine: {error}")


if __name__ == "__main__":
    main()
