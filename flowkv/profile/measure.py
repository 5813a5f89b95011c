"""Measure, fit, write."""

import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowkv.config import ClusterConfig, load_config
from flowkv.display import TerminalDisplay
from flowkv.errors import ConfigError, FlowKVError
from flowkv.launch.model import model_name, resolve_model
from flowkv.launch.node import running_node
from flowkv.profile.cells import grid, shuffled
from flowkv.profile.fit import Fitted, Measured, fit_steps
from flowkv.profile.links import measure_links
from flowkv.profile.rig import Rig
from flowkv.sim.costs import PROFILE_FORMAT, LinkSpeeds, Profile
from flowkv.sim.files import replaced
from flowkv.types import ModelInfo, PoolDescriptor

_REPEATS, _QUICK_REPEATS = 5, 2
_PACKAGES = ("flowkv", "torch", "transformers", "numba", "numpy")
_MIN_ALIKE = 3  # samples of one shape, to say how much they differ


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    out: Path
    model: str | None = None  # None: the bundled one
    dtype: str = "auto"
    threads: int = 0  # 0: as `flowkv serve` shares them out
    concurrency: int = 1
    is_quick: bool = False
    seed: int = 0
    is_toy: bool = False


def profile(options: ProfileOptions) -> None:
    """Write `options.out` and say what is in it. FlowKVError, and nothing is written, where that cannot be."""
    if options.concurrency < 1 or options.threads < 0:
        raise ConfigError("profile: --concurrency is at least 1, and --threads is not negative")
    config = _config(options)
    folder = resolve_model(config)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    found: tuple[Fitted, LinkSpeeds, int] | None = None
    with TerminalDisplay() as display, running_node(display, None) as node:
        rig = Rig(node)
        rig.start(config, folder, model_name(config, folder), options.concurrency)
        display.ready(f"measuring {options.concurrency} of {model_name(config, folder)}")
        _measure(rig, config, options, console)
        facts = next(iter(rig.subjects.values())).register
        assert rig.context is not None
        links = measure_links(node, rig.context, facts.peer.pool.block_bytes, _repeats(options))
        samples = [sample for subject in rig.subjects.values() for sample in subject.samples]
        fitted = fit_steps(samples, options.seed)
        report = _report(config, options, facts.model, facts.peer.pool, samples, fitted, links)
        with replaced(options.out) as file:
            file.write(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
        found = fitted, links, len(samples)
    if found is None:  # told to stop
        raise FlowKVError(f"profile: stopped before it was done; {options.out} is as it was")
    _tell(console, options.out, *found)


def _config(options: ProfileOptions) -> ClusterConfig:
    overrides: dict[str, Any] = {
        "dtype": options.dtype, "toy": options.is_toy, "prefill": 0, "decode": 0, "mixed": options.concurrency,
        "engine.threads": options.threads,
    }  # fmt: skip
    return load_config(None, overrides if options.model is None else overrides | {"model": options.model})


def _repeats(options: ProfileOptions) -> int:
    return _QUICK_REPEATS if options.is_quick else _REPEATS


def _measure(rig: Rig, config: ClusterConfig, options: ProfileOptions, console: Console) -> None:
    engine = config.engine
    facts = next(iter(rig.subjects.values())).register
    cells = grid(engine.max_batch_tokens, engine.max_choices, facts.model.max_model_tokens, options.is_quick)
    orders = [shuffled(cells, _repeats(options), options.seed + i) for i in range(options.concurrency)]
    with _progress(console, sum(map(len, orders)) + len(cells) * options.concurrency) as on_done:
        rig.run([cells] * options.concurrency, on_done)  # kernels compile, caches fill
        with rig.counting():
            rig.run(orders, on_done)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bars:
        task = bars.add_task("measuring", total=total)
        yield lambda: bars.advance(task)


# --- what was found ------------------------------------------------------------------------------------------------


def noise_fraction(samples: Sequence[Measured]) -> float:
    """How far single steps of one shape lie from their median, relative to it: within this, two thirds of them do."""
    alike = defaultdict(list)
    for sample in samples:
        if sample.num_steps == 1:
            alike[sample.shape].append(sample.seconds)
    groups = [seconds for seconds in alike.values() if len(seconds) >= _MIN_ALIKE]
    deviations = sorted(abs(s / median(seconds) - 1.0) for seconds in groups for s in seconds)
    return deviations[len(deviations) * 2 // 3] if deviations else 0.0


def _report(
    config: ClusterConfig,
    options: ProfileOptions,
    model: ModelInfo,
    pool: PoolDescriptor,
    samples: Sequence[Measured],
    fitted: Fitted,
    links: LinkSpeeds,
) -> dict[str, Any]:
    measured = Profile(
        format=PROFILE_FORMAT, model=model.name, dtype=model.dtype, hardware=_hardware(),
        max_model_tokens=model.max_model_tokens, vocab_size=model.vocab_size,
        token_bytes=pool.block_bytes // config.engine.block_size, kv_bytes=pool.num_blocks * pool.block_bytes,
        noise_fraction=noise_fraction(samples), fit=fitted.fit, links=links,
    )  # fmt: skip
    return {
        **msgspec.to_builtins(measured),
        "fitted": {
            "form": fitted.form, "num_samples": len(samples), "held_out_error": fitted.held_out_error,
            "held_out_bias": fitted.held_out_bias, "held_out_errors": fitted.errors,
        },
        "measured": {
            "written": datetime.now(UTC).isoformat(timespec="seconds"), "cores": len(os.sched_getaffinity(0)),
            "concurrency": options.concurrency, "threads": options.threads, "quick": options.is_quick,
            "seed": options.seed, "python": platform.python_version(), **{name: version(name) for name in _PACKAGES},
        },
    }  # fmt: skip


def _hardware() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _tell(console: Console, out: Path, fitted: Fitted, links: LinkSpeeds, num_samples: int) -> None:
    errors = ", ".join(f"{name} {error:.1%}" for name, error in fitted.errors.items())
    console.print(f"steps: {num_samples} samples, fitted by {fitted.form}; mean error on samples left out: {errors}")
    console.print(
        f"writes: {links.link_bytes_per_s / 1e9:.2f} GB/s and {links.call_s * 1e6:.1f} us a call; "
        f"messages: {links.message_s * 1e6:.0f} us"
    )
    console.print(f"wrote {out}")
