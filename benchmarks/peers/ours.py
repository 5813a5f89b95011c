"""FlowKV itself, and `transformers`' `generate_batch`, which runs in FlowKV's own environment."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.decode import TransformersSide
from benchmarks.peers.drive import Figures, drive
from benchmarks.peers.model import DTYPE
from benchmarks.peers.turns import Contestant, Play
from benchmarks.spawn import ServerProcess

NAME = "flowkv"


def flowkv(model: Path, options: str, folder: Path) -> Contestant:
    """`options` as one would type them after `flowkv serve MODEL`; the log goes to `folder`."""
    arguments = [str(model), "--dtype", DTYPE, "--kv-memory", "1GiB", *shlex.split(options)]

    @contextmanager
    def open_() -> Iterator[Play]:
        with ServerProcess(arguments, folder / f"{NAME}.log") as url:
            yield partial(drive, url)

    return Contestant(NAME, {"arguments": arguments[1:]}, open_)


def generate_batch(model: Path, folder: Path) -> Contestant:
    """One thread, a process of its own; it streams nothing, so it has neither TTFT nor ITL."""

    @contextmanager
    def open_() -> Iterator[Play]:
        with (folder / "generate_batch.log").open("w") as log:
            side = TransformersSide(model, DTYPE, log)
            try:
                yield lambda load, seed: Figures(side.round(load, seed).whole_rate)
            finally:
                side.close()

    settings: Mapping[str, object] = {"threads": 1, "attention": "sdpa", "page_size": 32}
    return Contestant("generate_batch", settings, open_)
