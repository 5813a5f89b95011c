"""What runs say together: means over seeds, the best of the others, and whether a target is met."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.scheduling.cases import Row


class Range(NamedTuple):
    """Of one figure over seeds."""

    mean: float
    low: float
    high: float


def group(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """Rows by the value of one field, or the tuple of several, in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)
        groups.setdefault(key, []).append(row)
    return groups


def over_seeds(rows: Sequence[Row], value: Callable[[Row], float]) -> Range:
    values = [value(row) for row in rows]
    return Range(sum(values) / len(values), min(values), max(values))


def mean_of(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return over_seeds(rows, value).mean


def good(row: Row) -> float:
    return float(row["good_fraction"])


def goodput(row: Row) -> float:
    return float(row["goodput_per_s"])


def point(spread: str, name: str) -> Callable[[Row], float]:
    """One point of a spread, such as ("itl_s", "p99"), in seconds; infinite where no request got so far."""

    def of(row: Row) -> float:
        return math.inf if row[spread] is None else float(row[spread][name])

    return of


def best(rows: Sequence[Row], names: Iterable[str], value: Callable[[Row], float], *, is_least: bool = False) -> str:
    """Of these configurations the one with the highest (or lowest) mean; of equal ones the first."""
    groups = group(rows, "configuration")
    sign = -1 if is_least else 1
    return max((name for name in names if name in groups), key=lambda name: sign * mean_of(groups[name], value))


# --- cells ---------------------------------------------------------------------------------------------------------


def percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"


def ranged(values: Range) -> str:
    """In percent: the mean, and behind it what seeds span where they differ."""
    if values.low == values.high:
        return percent(values.mean)
    return f"{percent(values.mean)} ({percent(values.low)}..{percent(values.high)})"


def ms(seconds: float | None) -> str:
    return "-" if seconds is None or math.isinf(seconds) else f"{seconds * 1e3:,.1f}"


def seconds(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:,.2f}"


def less(fraction: float) -> str:
    """Of a figure that is better the lower it is."""
    return f"{abs(fraction):.1%} {'less' if fraction >= 0 else 'MORE'}"


def verdict(is_met: bool) -> str:
    return "[green]met[/green]" if is_met else "[bold red]MISSED[/bold red]"
