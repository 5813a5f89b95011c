"""Two production traces at 1, 2, 4 and 8 times their arrival rates, on 8 instances.

The conversation trace (12,035 tokens in, 343 out on average) loads 8 H100 from a sixth to beyond what they can do. The
code trace (2,048 in, 28 out) would keep the same 8 nearly idle even at eight times its rate, so it runs on 8 L20. The
simulator shares no prefixes between requests, for any configuration.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.report import print_table
from benchmarks.scheduling import configurations, plots, summary
from benchmarks.scheduling.cases import Case, Row, Run
from benchmarks.scheduling.configurations import FLEXIBLE, MIXED, STOCK, split
from benchmarks.scheduling.loads import Trace
from flowkv.sim.figures import Slo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "traces"
SPEEDUPS = (1, 2, 4, 8)
SPLITS = {split(n): n for n in (2, 4, 6)}  # 1:3, 1:1, 3:1
WITHIN = 0.02  # of the best other goodput
QUICK_REQUESTS, QUICK_SPEEDUPS = 60, (2, 8)

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """A trace on some hardware. Long prompts need seconds even alone (126,000 tokens: about 12 s on an H100)."""

    trace: str
    cost: str
    slo: Slo
    num_requests: int | None = None  # the first so many; None: all

    @property
    def name(self) -> str:
        return f"{self.trace}, {self.cost.partition('/')[2]}"


SETTINGS = (
    Setting("conversation", "llama-3.1-8b/h100", Slo(5.0, 0.025), num_requests=4000),
    Setting("code", "llama-3.1-8b/l20", Slo(4.0, 0.050)),
)


def measure(run: Run) -> Results:
    speedups = QUICK_SPEEDUPS if run.quick else SPEEDUPS
    cases = [
        _case(setting, name, speedup, QUICK_REQUESTS if run.quick else setting.num_requests)
        for setting in SETTINGS
        for speedup in speedups
        for name in clusters(setting)
    ]
    rows = run.rows("traces", cases)
    settings = {
        one.name: {"slo": {"ttft_s": one.slo.ttft_s, "tpot_s": one.slo.tpot_s}, "clusters": clusters(one)}
        for one in SETTINGS
    }
    return {"settings": settings, "verdicts": [judge(found) for found in _groups(rows)], "runs": rows}


def clusters(setting: Setting) -> dict[str, configurations.Overrides]:
    base = configurations.base(setting.cost, setting.slo.ttft_s, setting.slo.tpot_s)
    return {
        **{name: configurations.fixed(base, num_prefill) for name, num_prefill in SPLITS.items()},
        MIXED: configurations.mixed(base),
        STOCK: configurations.stock(base),
        FLEXIBLE: configurations.flexible(base),
    }


def _case(setting: Setting, name: str, speedup: int, num_requests: int | None) -> Case:
    load = Trace(setting.trace, speedup, num_requests)
    key = {"setting": setting.name, "speedup": speedup, "itl_bound_s": setting.slo.tpot_s}
    return Case(
        name, clusters(setting)[name], load, setting.slo, 0, key, weight=2.0 if "conv" in setting.trace else 1.0
    )


# --- what it says --------------------------------------------------------------------------------------------------


def _groups(rows: list[Row]) -> list[list[Row]]:
    return list(summary.group(rows, "setting", "speedup").values())


def judge(rows: list[Row]) -> Row:
    """Of one trace at one rate: goodput of flexible roles beside the best other, and ITL p99 beside all mixed.

    Where chunks are bounded all mixed is in the comparison; `STOCK` is what a server without the bound does.
    """
    others = (*SPLITS, MIXED, STOCK)
    one = {row["configuration"]: row for row in rows}
    best = summary.best(rows, others, summary.goodput)
    ratio = summary.goodput(one[FLEXIBLE]) / summary.goodput(one[best]) if summary.goodput(one[best]) else 1.0
    itl_p99 = summary.point("itl_s", "p99")
    return {
        "setting": rows[0]["setting"], "speedup": rows[0]["speedup"],
        "best_other": best, "goodput_ratio": ratio, "is_met": ratio >= 1 - WITHIN,
        "itl_p99_s": {name: itl_p99(row) for name, row in one.items()},
        "is_itl_kept": itl_p99(one[FLEXIBLE]) <= rows[0]["itl_bound_s"],
    }  # fmt: skip


_HEADER = (
    "configuration", "in SLO\n%", "goodput\n1/s", "makespan\ns", "TTFT p50\ns", "TTFT p99\ns", "ITL p50\nms",
    "ITL p99\nms", "TPOT p50\nms", "TPOT p99\nms", "refused", "flips",
)  # fmt: skip


def show(console: Console, results: Results) -> None:
    for rows, found in zip(_groups(results["runs"]), results["verdicts"], strict=True):
        title = f"{found['setting']}, {found['speedup']} times its rate"
        print_table(console, _HEADER, [_cells(row) for row in rows], title)
        itl = "within" if found["is_itl_kept"] else "beyond"
        console.print(
            f"flexible: {found['goodput_ratio']:.3f} of the goodput of {found['best_other']}"
            f" (wanted: {1 - WITHIN:.2f}): {summary.verdict(found['is_met'])}; its ITL p99 is {itl} the bound\n"
        )


def _cells(row: Row) -> list[str]:
    of = summary.point
    return [
        row["configuration"], summary.percent(row["good_fraction"]), f"{row['goodput_per_s']:.2f}",
        f"{row['duration_s']:,.0f}",
        *(summary.seconds(of("ttft_s", at)(row)) for at in ("p50", "p99")),
        *(summary.ms(of(spread, at)(row)) for spread in ("itl_s", "tpot_s") for at in ("p50", "p99")),
        str(row["num_refused"]), str(row["num_flips"]),
    ]  # fmt: skip


def draw(results: Results) -> "Figure":
    by_setting = summary.group(results["runs"], "setting")
    figure, (top, bottom) = plots.panels(2, len(by_setting), 4.0, 3.2)
    for column, (setting, rows) in enumerate(by_setting.items()):
        above, below = top[column], bottom[column]
        groups = summary.group(rows, "configuration")
        colors = plots.colors(list(groups))
        for name, found in groups.items():
            xs = [row["speedup"] for row in found]
            plots.line(above, name, colors[name], xs, [100 * row["good_fraction"] for row in found])
            plots.line(below, name, colors[name], xs, [summary.point("itl_s", "p99")(row) for row in found], 1e3)
        plots.limit(below, 1e3 * rows[0]["itl_bound_s"], "SLO")
        plots.label(above, setting, "", "requests within the SLO, %" if column == 0 else "")
        plots.label(below, "", "times its arrival rate", "ITL p99, ms" if column == 0 else "")
        above.set_ylim(0, 103)
        below.set_yscale("log")
        below.yaxis.set_major_formatter("{x:g}")
        below.yaxis.set_minor_formatter("{x:g}")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row["speedup"] for row in rows}), sorted({row["speedup"] for row in rows}))
    plots.legend(figure, top[0])
    return figure
