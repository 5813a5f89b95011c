"""What a comparison comes to: medians of each side, and of the ratio of pairs."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from benchmarks.decode import Load
from benchmarks.peers.turns import Sample
from benchmarks.report import print_table

_HEADER = ("batch x in/out", "tokens/s", "peer", "ratio", "of pairs", "won", "TTFT ms", "peer", "ITL ms", "peer")


def summarize(names: tuple[str, str], samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """One entry a load that has a whole pair. `ratios` are first over second, round by round, in tokens/s."""
    found: dict[Load, dict[int, dict[str, Sample]]] = {}
    for sample in samples:
        found.setdefault(sample.load, {}).setdefault(sample.round, {})[sample.contestant] = sample
    pairs = {load: [pair for pair in rounds.values() if len(pair) == 2] for load, rounds in found.items()}
    return [_summary(names, load, whole) for load, whole in pairs.items() if whole]


def _summary(names: tuple[str, str], load: Load, pairs: Sequence[Mapping[str, Sample]]) -> dict[str, Any]:
    first, second = names
    ratios = [pair[first].figures.tokens_per_s / pair[second].figures.tokens_per_s for pair in pairs]
    return {
        "load": asdict(load),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "medians": {name: _medians([pair[name] for pair in pairs]) for name in names},
        "rounds": [
            {name: {"place": pair[name].place, **asdict(pair[name].figures)} for name in names} for pair in pairs
        ],
    }


def _medians(samples: Sequence[Sample]) -> dict[str, float | None]:
    columns = [asdict(sample.figures) for sample in samples]
    return {name: _median([column[name] for column in columns]) for name in columns[0]}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def print_comparison(console: Console, names: tuple[str, str], summaries: Sequence[Mapping[str, Any]]) -> None:
    print_table(console, _HEADER, [_row(names, summary) for summary in summaries], f"{names[0]} beside {names[1]}")


def _row(names: tuple[str, str], summary: Mapping[str, Any]) -> list[str]:
    load, ratios = summary["load"], summary["ratios"]
    ours, theirs = (summary["medians"][name] for name in names)
    return [
        "{batch} x {prompt_tokens}/{output_tokens}".format_map(load),
        f"{ours['tokens_per_s']:.0f}",
        f"{theirs['tokens_per_s']:.0f}",
        f"{summary['ratio']:.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}",
        *(_ms(side[key]) for key in ("ttft_s", "itl_s") for side in (ours, theirs)),
    ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
