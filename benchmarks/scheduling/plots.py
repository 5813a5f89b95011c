"""How every picture of these benchmarks looks. Imports matplotlib when used."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.scheduling.configurations import ADMISSION, FLEXIBLE, MIXED, MIXED_ADMISSION, STOCK
from flowkv.sim.files import replaced
from flowkv.sim.plots import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 110
_INK, _FAINT = "#1f2430", "#6b7383"
_COLORS = {FLEXIBLE: "#c2410c", MIXED: "#2f6fde", STOCK: "#8fb2f0", ADMISSION: "#f0a36b", MIXED_ADMISSION: "#5a6f9e"}
_OTHERS = ("#1b7f5c", "#58a588", "#93c6b2", "#7570b3", "#a6a2cf", "#8c96a8")
LIMIT = "#9aa1ad"


def panels(num_rows: int, num_columns: int, width: float, height: float) -> tuple["Figure", list[list["Axes"]]]:
    """A figure of so many panels, each `width` by `height` inches. ConfigError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(num_columns * width, num_rows * height), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LIMIT)
        axes.tick_params(colors=_FAINT, labelsize=9)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    return figure, [list(row) for row in grid]


def colors(names: Sequence[str]) -> dict[str, str]:
    """The same for the same configuration in every picture, as far as they are few."""
    others = iter(_OTHERS * len(names))
    return {name: _COLORS.get(name) or next(others) for name in names}


def line(
    axes: "Axes", name: str, color: str, xs: Sequence[float], ys: Sequence[float | None], scale: float = 1.0
) -> None:
    """Ours stands out; a y of None leaves a gap."""
    width, order, size = (2.6, 5, 5) if name == FLEXIBLE else (1.4, 2, 3)
    heights = [math.nan if y is None else scale * y for y in ys]
    axes.plot(xs, heights, color=color, label=name, lw=width, zorder=order, marker="o", ms=size)


def label(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
    axes.set_xlabel(x, fontsize=9, color=_FAINT)
    axes.set_ylabel(y, fontsize=9, color=_FAINT)


def limit(axes: "Axes", value: float, text: str) -> None:
    """A dashed line across, with its name."""
    axes.axhline(value, color=LIMIT, ls="--", lw=1)
    axes.annotate(
        text, (0, value), xycoords=("axes fraction", "data"), xytext=(3, 2), textcoords="offset points", fontsize=8,
        color=_FAINT,
    )  # fmt: skip


def legend(figure: "Figure", axes: "Axes") -> None:
    """One for all panels, below them."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), fontsize=9, frameon=False)


def save(figure: "Figure", path: Path) -> None:
    """A PNG, there whole or not at all; of 256 colours, which these pictures need no more than."""
    from io import BytesIO

    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    with Image.open(drawn) as image, replaced(path) as file:
        image.convert("RGB").quantize(256).save(file, format="png", optimize=True)
