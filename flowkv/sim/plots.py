"""Pictures of a simulated run: its load over time, and how long requests took. Imports matplotlib when used."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowkv.errors import ConfigError
from flowkv.sim.figures import InstanceSample, Sample, SimResult, Slo
from flowkv.sim.files import replaced
from flowkv.types import Regime, Role

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROLE_COLORS = {Role.PREFILL: "#d95f02", Role.DECODE: "#1f78b4", Role.MIXED: "#7570b3"}
_REGIME_COLORS = {
    Regime.NORMAL: "#e5f5e0", Regime.IMBALANCED: "#fdd49e", Regime.OVERLOADED: "#ef6548", Regime.UNDERLOADED: "#d0d1e6",
}  # fmt: skip
_ABSENT = "#ffffff"
_MAX_LINES = 16  # one for each instance; of more, the sum alone
_MAX_COLUMNS = 2000  # of the picture of roles: more than it has pixels
_DPI = 110


def require_matplotlib() -> None:
    """Raises ConfigError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'flowkv[plots]'") from None


def write_plots(folder: Path, result: SimResult, slo: Slo) -> list[Path]:
    """`load.png` and `latency.png`, each there whole or not at all. ConfigError without matplotlib."""
    require_matplotlib()
    paths = [folder / "load.png", folder / "latency.png"]
    for path, figure in zip(paths, (load_figure(result), latency_figure(result, slo)), strict=True):
        with replaced(path) as file:
            figure.savefig(file, format="png", dpi=_DPI)
    return paths


# --- load over time ------------------------------------------------------------------------------------------------


def load_figure(result: SimResult) -> "Figure":
    """Queued prompt tokens, decoding choices and used KV blocks by instance, and the role of each, over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    queue, decoding, used, roles = figure.subplots(4, 1, sharex=True)
    names = _names(result.samples)
    _lines(queue, result.samples, names, lambda one: one.waiting_tokens)
    queue.set_ylabel("prompt tokens waiting")
    _lines(decoding, result.samples, names, lambda one: one.num_decoding)
    decoding.set_ylabel("choices decoding")
    _lines(used, result.samples, names, lambda one: 100 * one.used_fraction, is_total=False)
    used.set_ylabel("KV blocks used, %")
    used.set_ylim(0, 105)
    _bands(roles, result.samples, names)
    roles.set_xlabel("time, s")
    return figure


def _names(samples: Sequence[Sample]) -> list[str]:
    """Every instance that there ever was, in the order in which they came."""
    return list(dict.fromkeys(name for sample in samples for name in sample.instances))


def _lines(
    axes: "Axes",
    samples: Sequence[Sample],
    names: Sequence[str],
    value: Callable[[InstanceSample], float],
    is_total: bool = True,
) -> None:
    """A line for each instance in the colour of its first role, and one for their sum (or mean)."""
    times_s = [sample.time_s for sample in samples]
    begun: set[Role] = set()
    for name in names if len(names) <= _MAX_LINES else ():
        present = [(s.time_s, s.instances[name]) for s in samples if name in s.instances]
        role = present[0][1].role
        label = None if role in begun else f"each that began as {role}"
        begun.add(role)
        ys = [value(one) for _, one in present]
        axes.plot([at_s for at_s, _ in present], ys, color=_ROLE_COLORS[role], lw=0.6, alpha=0.6, label=label)
    sums = [sum(map(value, sample.instances.values())) for sample in samples]
    if is_total:
        axes.plot(times_s, sums, color="black", lw=0.8, label="all instances")
    else:
        means = [total / max(1, len(sample.instances)) for total, sample in zip(sums, samples, strict=True)]
        axes.plot(times_s, means, color="black", lw=0.8, label="mean of all instances")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.97), ncols=4, fontsize=8, frameon=False)


def _bands(axes: "Axes", samples: Sequence[Sample], names: Sequence[str]) -> None:
    """A row for each instance in the colour of its role, and above them one in the colour of the regime."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    shown = samples[:: max(1, len(samples) // _MAX_COLUMNS)]
    rows = [[to_rgb(_REGIME_COLORS[sample.regime]) for sample in shown]]
    for name in names:
        found = (sample.instances.get(name) for sample in shown)
        rows.append([to_rgb(_ABSENT if one is None else _ROLE_COLORS[one.role]) for one in found])
    if shown:
        extent = (shown[0].time_s, max(shown[-1].time_s, shown[0].time_s + 1e-9), len(rows) - 0.5, -0.5)
        axes.imshow(rows, aspect="auto", interpolation="nearest", extent=extent)
    if len(names) <= _MAX_LINES:
        axes.set_yticks(range(len(rows)), ["regime", *names], fontsize=8)
    else:
        axes.set_ylabel(f"{len(names)} instances")
    colors = {str(word): color for words in (_ROLE_COLORS, _REGIME_COLORS) for word, color in words.items()}
    seen = {one.role for s in shown for one in s.instances.values()} | {sample.regime for sample in shown}
    patches = [
        Patch(facecolor=color, edgecolor="grey", label=str(word)) for word, color in colors.items() if word in seen
    ]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=7, fontsize=8, frameon=False)


# --- latency -------------------------------------------------------------------------------------------------------


def latency_figure(result: SimResult, slo: Slo) -> "Figure":
    """The share of requests within a TTFT and a TPOT, and of gaps within an ITL; the SLO as upright lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, (values_s, fractions), bound_s) in zip(figure.subplots(1, 3), _curves(result, slo), strict=True):
        axes.step([value * 1e3 for value in values_s], fractions, where="post", color=_ROLE_COLORS[Role.DECODE])
        if bound_s is not None:
            bound_ms = bound_s * 1e3
            axes.axvline(bound_ms, color=_ROLE_COLORS[Role.PREFILL], ls="--", lw=1)
            axes.set_title(f"dashed: the SLO, {bound_ms:,g} ms", fontsize=9)
        if values_s and values_s[0] > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.25, which="both")
        axes.set_xlabel(f"{name}, ms")
        axes.set_ylabel("fraction of gaps" if name == "ITL" else "fraction of requests")
    return figure


Curve = tuple[list[float], list[float]]


def _curves(result: SimResult, slo: Slo) -> Iterator[tuple[str, Curve, float | None]]:
    answered = [record for record in result.records if record.error is None]
    yield "TTFT", _cumulative([r.ttft_s for r in answered if r.ttft_s is not None]), slo.ttft_s
    yield "TPOT", _cumulative([r.tpot_s for r in answered if r.tpot_s is not None]), slo.tpot_s
    yield "ITL", result.itl.curve(), None


def _cumulative(values: list[float]) -> Curve:
    return sorted(values), [rank / len(values) for rank in range(1, len(values) + 1)]
