"""4 L20 and 4 H20: prompts on the L20 and decodes on the H20, the reverse, and what the controller finds by itself.

An H20 has nearly five times the bandwidth of an L20 and twice its memory, at 1.24 times the arithmetic, so decodes
belong there (FlowKV, arXiv 2504.03775, section 5: 8.8 % to 40.1 % less E2E latency than the reverse). The controller is
told of no hardware: it sees only how long steps take.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.report import print_table
from benchmarks.scheduling import configurations, loads, plots, summary
from benchmarks.scheduling.cases import Case, Row, Run
from benchmarks.scheduling.configurations import MIXED
from flowkv.sim.figures import Slo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "heterogeneous"
L20, H20 = ["llama-3.1-8b/l20"] * 4, ["llama-3.1-8b/h20"] * 4
DATASETS = ("gov_report", "multi_news", "qmsum")
PAPER = {"gov_report": 0.3467, "multi_news": 0.401, "qmsum": 0.088}  # less E2E latency than the reverse
SHARES = (0.5,)  # of what the instances could do without any loss
SLO = Slo(ttft_s=10.0, tpot_s=0.05)
PROPER, REVERSE = "P on L20, D on H20", "P on H20, D on L20"
FROM_PROPER, FROM_REVERSE = "flexible, P began on L20", "flexible, P began on H20"
WHOLE_S, QUICK_S = 300.0, 20.0

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    dataset: str
    has_slo: bool

    def rate(self, share: float) -> float:
        return loads.longbench_rate(L20 + H20, self.dataset, share)


def measure(run: Run) -> Results:
    settings = [Setting(dataset, has_slo) for dataset in DATASETS for has_slo in (False, True)]
    seeds = range(1 if run.quick else min(run.seeds, 3))
    cases = [
        _case(run, setting, share, name, seed)
        for setting in settings
        for share in SHARES
        for name in clusters(setting.has_slo)
        for seed in seeds
    ]
    rows = run.rows("heterogeneous", cases)
    return {
        "slo": {"ttft_s": SLO.ttft_s, "tpot_s": SLO.tpot_s}, "duration_s": QUICK_S if run.quick else WHOLE_S,
        "paper_less": PAPER, "clusters": clusters(has_slo=True), "found": [judge(found) for found in _groups(rows)],
        "runs": rows,
    }  # fmt: skip


def clusters(has_slo: bool) -> dict[str, configurations.Overrides]:
    bounds = (SLO.ttft_s, SLO.tpot_s) if has_slo else (None, None)
    proper = configurations.base(L20 + H20, *bounds)
    reverse = configurations.base(H20 + L20, *bounds)
    return {
        PROPER: configurations.fixed(proper, 4),
        REVERSE: configurations.fixed(reverse, 4),
        MIXED: configurations.mixed(proper),
        FROM_PROPER: configurations.flexible(proper),
        FROM_REVERSE: configurations.flexible(reverse),
    }


def _case(run: Run, setting: Setting, share: float, name: str, seed: int) -> Case:
    rate = setting.rate(share)
    load = loads.Longbench(setting.dataset, rate, QUICK_S if run.quick else WHOLE_S, seed)
    key = {"dataset": setting.dataset, "has_slo": setting.has_slo, "share": share, "rate": rate}
    return Case(name, clusters(setting.has_slo)[name], load, SLO, seed, key, weight=rate)


# --- what it says --------------------------------------------------------------------------------------------------


def _groups(rows: list[Row]) -> list[list[Row]]:
    return list(summary.group(rows, "dataset", "has_slo", "share").values())


def judge(rows: list[Row]) -> Row:
    """Of one shape at one rate: mean E2E latency of each, and on which hardware flexible roles put the prompts."""
    e2el = summary.point("e2el_s", "mean")
    groups = summary.group(rows, "configuration")
    means = {name: summary.mean_of(found, e2el) for name, found in groups.items()}
    best = min((PROPER, REVERSE, MIXED), key=means.__getitem__)
    flexible = {FROM_PROPER: L20 + H20, FROM_REVERSE: H20 + L20}
    return {
        **{name: rows[0][name] for name in ("dataset", "has_slo", "share", "rate")},
        "e2el_mean_s": means,
        "good": {name: summary.mean_of(found, summary.good) for name, found in groups.items()},
        "less_than_reverse": 1 - means[PROPER] / means[REVERSE],
        "best_other": best,
        "flexible_to_best_other": {name: means[name] / means[best] for name in flexible},
        "prefill_on_l20": {
            name: sum(prefill_on_l20(row, costs) for row in groups[name]) / len(groups[name])
            for name, costs in flexible.items()
        },
    }


def prefill_on_l20(row: Row, costs: list[str]) -> float:
    """Of the time that instances were prefill instances, in the second half, the share of L20; 0.5 where none was.

    Instances are named role-number, numbers in the order of `costs`.
    """
    spent = [(costs[int(name.rpartition("-")[2])], share) for name, share in row["prefill_fraction"].items()]
    whole = sum(share for _, share in spent)
    return sum(share for cost, share in spent if cost in L20) / whole if whole else 0.5


_HEADER = (
    "configuration", "E2E mean\ns", "E2E p99\ns", "TTFT mean\ns", "TPOT mean\nms", "in SLO\n%", "flips", "P on L20\n%",
)  # fmt: skip


def show(console: Console, results: Results) -> None:
    for rows, found in zip(_groups(results["runs"]), results["found"], strict=True):
        known = "the SLO is known" if found["has_slo"] else "no SLO"
        title = f"{found['dataset']}, {found['rate']:g} requests/s ({found['share']:.0%} of what fits), {known}"
        cells = [_cells(name, one, found) for name, one in summary.group(rows, "configuration").items()]
        print_table(console, _HEADER, cells, title)
        ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found["flexible_to_best_other"].items())
        console.print(
            f"{PROPER}: {summary.less(found['less_than_reverse'])} than the reverse"
            f" (the paper: {results['paper_less'][found['dataset']]:.1%}); times {found['best_other']}: {ratios}\n"
        )


def _cells(name: str, rows: list[Row], found: Row) -> list[str]:
    def mean(spread: str, at: str) -> float:
        return summary.mean_of(rows, summary.point(spread, at))

    on_l20 = found["prefill_on_l20"].get(name)
    return [
        name, *(summary.seconds(mean("e2el_s", at)) for at in ("mean", "p99")), summary.seconds(mean("ttft_s", "mean")),
        summary.ms(mean("tpot_s", "mean")), summary.percent(found["good"][name]),
        f"{summary.mean_of(rows, lambda row: row['num_flips']):.0f}", "-" if on_l20 is None else f"{100 * on_l20:.0f}",
    ]  # fmt: skip


def draw(results: Results) -> "Figure":
    by_slo = summary.group(results["found"], "has_slo")
    figure, grid = plots.panels(len(by_slo), len(DATASETS), 3.8, 3.0)
    for axes_row, (has_slo, of_slo) in zip(grid, by_slo.items(), strict=True):
        for axes, (dataset, found) in zip(axes_row, summary.group(of_slo, "dataset").items(), strict=True):
            names = list(found[0]["e2el_mean_s"])
            colors = plots.colors(names) | {FROM_PROPER: "#c2410c", FROM_REVERSE: "#f0a36b"}
            for name in names:
                ys = [one["e2el_mean_s"][name] for one in found]
                plots.line(axes, name, colors[name], [one["rate"] for one in found], ys)
            axes.set_ylim(bottom=0)
            y = "mean E2E latency, s" if axes is axes_row[0] else ""
            plots.label(axes, f"{dataset}, {'SLO' if has_slo else 'no SLO'}", "requests/s", y)
    plots.legend(figure, grid[0][0])
    return figure
