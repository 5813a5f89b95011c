"""What a plan says: a verdict in a sentence or two, and the table behind it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flowkv.sim.candidates import FIXED, FLEXIBLE
from flowkv.sim.plan import MAX_SPEEDUP, Row, best, best_of_kind

_NOTABLE_SHARE = 0.005  # of requests within the SLO: less is no difference
_NOTABLE_LATENCY = 1.05
_NOTABLE_RATE = 1.03  # above what a bisection leaves open


class Verdict(NamedTuple):
    """`pays`: None where it makes no difference, or nothing can be split."""

    text: str
    winner: Row
    pays: bool | None


# --- one load ------------------------------------------------------------------------------------------------------


def verdict_of_load(rows: Sequence[Row], has_slo: bool, target: float) -> Verdict:
    """`rows` as `plan.compare` gives them."""
    mixed, split = best(rows, is_split=False), best(rows, is_split=True)
    assert mixed is not None
    if split is None:
        found = Verdict(f"A single instance cannot be split: it {_figure(mixed, has_slo)}.", mixed, None)
    elif _is_better(split, mixed):
        text = f"Splitting pays: {_told(split, mixed, has_slo)} where {_again(mixed, split, has_slo)}"
        found = Verdict(f"{text}{_fixed_too(rows, split, mixed, has_slo)}.", split, True)
    elif _is_better(mixed, split):
        text = f"{_told(mixed, split, has_slo)} where the best split, {_again(split, mixed, has_slo)}"
        found = Verdict(f"Splitting does not pay here: {text}.", mixed, False)
    else:
        text = f"{_told(mixed, split, has_slo)}, and the best split, {_again(split, mixed, has_slo)}"
        found = Verdict(f"Splitting makes no difference here: {text}.", mixed, None)
    if has_slo and found.winner.outcome.good_fraction < target:
        found = found._replace(text=f"{found.text} Nothing keeps the target of {target:.1%}.")
    return found


def _is_better(row: Row, other: Row) -> bool:
    """Notably: by half a percent of the requests, or where they are equal in that by 5 % of the mean latency."""
    if not _is_equal(row, other):
        return row.outcome.good_fraction > other.outcome.good_fraction
    return row.merit[1] * _NOTABLE_LATENCY <= other.merit[1]


def _is_equal(row: Row, other: Row) -> bool:
    return abs(row.outcome.good_fraction - other.outcome.good_fraction) < _NOTABLE_SHARE


def _told(row: Row, other: Row, has_slo: bool) -> str:
    """`flexible 4P4D keeps 99.4% within the SLO`; latency is told where the share does not tell it from the other."""
    figure = _figure(row, has_slo)
    if has_slo and _is_equal(row, other):
        figure = f"{figure} and {_latency(row)}"
    if not row.candidate.is_split and row.candidate.num_instances > 1:
        figure = figure.replace("keeps", "keep").replace("answers", "answer")
    return f"{row.candidate.name} {figure}"


def _again(row: Row, other: Row, has_slo: bool) -> str:
    """The same where a sentence has said what is kept."""
    return _told(row, other, has_slo).replace(" within the SLO", "")


def _figure(row: Row, has_slo: bool) -> str:
    return f"keeps {row.outcome.good_fraction:.1%} within the SLO" if has_slo else _latency(row)


def _latency(row: Row) -> str:
    latency_s = row.outcome.e2el_mean_s
    return "answers nothing" if latency_s is None else f"answers in {latency_s:.3g} s on average"


def _fixed_too(rows: Sequence[Row], split: Row, mixed: Row, has_slo: bool) -> str:
    """Whether roles that stay would do, where flexible ones are best."""
    fixed = best_of_kind(rows, FIXED)
    if split.candidate.kind != FLEXIBLE or fixed is None:
        return ""
    does = "so does a fixed split" if _is_better(fixed, mixed) else "a fixed split would not"
    return f"; {does} ({_again(fixed, mixed, has_slo)})"


# --- the highest rate ----------------------------------------------------------------------------------------------


def verdict_of_rates(rows: Sequence[Row], rate: float, target: float) -> Verdict:
    """`rows` as `plan.capacities` gives them; `rate`: requests a second of the workload as it is."""
    mixed, split = best(rows, is_split=False), best(rows, is_split=True)
    assert mixed is not None
    fastest = mixed if split is None or split.speedup < mixed.speedup else split
    if fastest.speedup == 0:
        return Verdict(f"Nothing keeps {target:.1%} within the SLO, however slowly requests come.", fastest, None)
    if split is None:
        return Verdict(f"A single instance cannot be split: {_rate(mixed, rate, target)}.", mixed, None)
    if split.speedup >= mixed.speedup * _NOTABLE_RATE:
        text = f"Splitting pays: {_rate(split, rate, target)}, {_against(split, mixed, rate)}"
        return Verdict(f"{text}{_fixed_rate(rows, split, mixed, rate)}.", split, True)
    pays = False if mixed.speedup >= split.speedup * _NOTABLE_RATE else None
    text = "Splitting does not pay here" if pays is False else "Splitting makes no difference here"
    return Verdict(f"{text}: {_rate(mixed, rate, target)}, {_against(mixed, split, rate)}.", mixed, pays)


def _rate(row: Row, rate: float, target: float) -> str:
    each = rate * row.speedup / row.candidate.num_instances
    return (
        f"{row.candidate.name} {_takes(row)} {rate * row.speedup:.3g} requests/s ({each:.3g} an instance)"
        f" with {target:.1%} within the SLO"
    )


def _takes(row: Row) -> str:
    verb = "takes" if row.candidate.is_split or row.candidate.num_instances == 1 else "take"
    return f"{verb} at least" if row.speedup >= MAX_SPEEDUP else verb


def _against(row: Row, other: Row, rate: float) -> str:
    if other.speedup == 0:
        return f"which {other.candidate.name} keep at no rate"
    return f"{row.speedup / other.speedup:.3g} times the {rate * other.speedup:.3g} of {other.candidate.name}"


def _fixed_rate(rows: Sequence[Row], split: Row, mixed: Row, rate: float) -> str:
    fixed = best_of_kind(rows, FIXED)
    if split.candidate.kind != FLEXIBLE or fixed is None:
        return ""
    does = "so does a fixed split" if fixed.speedup >= mixed.speedup * _NOTABLE_RATE else "a fixed split would not"
    return f"; {does} ({fixed.candidate.name}: {rate * fixed.speedup:.3g})"


# --- the fewest instances ------------------------------------------------------------------------------------------


def verdict_of_fewest(
    compared: Mapping[int, Sequence[Row]], num_mixed: int | None, num_split: int | None, target: float
) -> Verdict:
    """`compared`: rows by number of instances; `num_mixed` and `num_split`: how few are enough, None if none are."""
    if num_mixed is None and num_split is None:
        most = max(compared)
        found = verdict_of_load(compared[most], has_slo=True, target=target)
        return found._replace(text=f"{most} instances are not enough. {found.text}")
    if num_mixed is None or (num_split is not None and num_split < num_mixed):
        assert num_split is not None
        split = _enough(compared[num_split], is_split=True)
        other = "no number of mixed ones does" if num_mixed is None else f"without splitting it takes {num_mixed}"
        return Verdict(f"Splitting pays: {_few(split)}; {other}.", split, True)
    mixed = _enough(compared[num_mixed], is_split=False)
    if num_split is None or num_mixed < num_split:
        other = "no split does" if num_split is None else f"split it takes {num_split}"
        return Verdict(f"Splitting does not pay here: {_few(mixed)}; {other}.", mixed, False)
    found = verdict_of_load(compared[num_mixed], has_slo=True, target=target)
    return found._replace(text=f"{num_mixed} instances are enough. {found.text}")


def _enough(rows: Sequence[Row], *, is_split: bool) -> Row:
    row = best(rows, is_split=is_split)
    assert row is not None
    return row


def _few(row: Row) -> str:
    count = row.candidate.num_instances
    instances = f"{count} instance{'s' if count > 1 else ''}"
    return f"{instances} ({row.candidate.name}) keep{'' if count > 1 else 's'} {row.outcome.good_fraction:.1%}" + (
        " within the SLO"
    )


# --- the table -----------------------------------------------------------------------------------------------------

_COLUMNS: dict[str, Callable[[Row], str]] = {
    "in SLO": lambda row: f"{row.outcome.good_fraction:.1%}",
    "worst seed": lambda row: f"{row.lowest_fraction:.1%}",
    "goodput/s": lambda row: f"{row.outcome.goodput_per_s:.2f}",
    "TTFT p99 s": lambda row: _seconds(row.outcome.ttft_p99_s),
    "TPOT p99 ms": lambda row: _seconds(row.outcome.tpot_p99_s, 1e3),
    "E2EL mean s": lambda row: _seconds(row.outcome.e2el_mean_s),
    "flips": lambda row: f"{row.outcome.num_flips:.3g}",
    "simulated": lambda row: f"{row.share:.1%}" if row.is_dropped else "all",
}


def table(rows: Iterable[Row], rate: float | None, has_slo: bool) -> tuple[list[str], list[list[str]]]:
    """Header and cells. With `rate`, of the workload as it is, also how many requests a second each row takes."""
    rows = list(rows)
    columns = dict(_COLUMNS) if rate is None else _rate_columns(rate) | _COLUMNS
    if all(row.lowest_fraction == row.outcome.good_fraction for row in rows):  # as with a single seed
        del columns["worst seed"]
    cells = [[row.candidate.name, *(cell(row) for cell in columns.values())] for row in rows]
    header = ["configuration", *columns]
    return (header if has_slo else [name.replace("in SLO", "answered") for name in header]), cells


def _rate_columns(rate: float) -> dict[str, Callable[[Row], str]]:
    return {
        "requests/s": lambda row: f"{rate * row.speedup:.2f}",
        "an instance": lambda row: f"{rate * row.speedup / row.candidate.num_instances:.2f}",
    }


def _seconds(value_s: float | None, factor: float = 1.0) -> str:
    return "-" if value_s is None else f"{value_s * factor:.3g}"


def row_json(row: Row, rate: float | None) -> dict[str, Any]:
    candidate = row.candidate
    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "policy": candidate.policy,
        "num_instances": candidate.num_instances,
        "overrides": candidate.overrides,
        "share": row.share,
        "is_dropped": row.is_dropped,
        "speedup": row.speedup,
        **({} if rate is None else {"requests_per_s": rate * row.speedup}),
        "lowest_fraction": row.lowest_fraction,
        **row.outcome._asdict(),
    }
