"""LongBench shapes: long prompts, answers of 512 tokens; flexible P/D against serving both phases together.

Equal instances: 4 L20 and 4 H20 as in the paper (FlowKV, arXiv 2504.03775, figure 4: P on L20, D on H20), and 8 A100.
Rates are shares of what the instances could do at most if each did both phases. The paper's gains are differences of
means with their authors' servers; here both sides run the same engine, so that only the split differs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.report import print_table
from benchmarks.scheduling import configurations, loads, plots, summary
from benchmarks.scheduling.cases import Case, Row, Run
from benchmarks.scheduling.configurations import FLEXIBLE, MIXED, NUM_INSTANCES, STOCK, split
from flowkv.sim.figures import Slo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "longbench"
MODEL = "llama-3.1-8b"
HARDWARE = {"4 L20 + 4 H20": ["l20"] * 4 + ["h20"] * 4, "8 A100": ["a100"] * NUM_INSTANCES}
DATASETS = ("gov_report", "multi_news", "qmsum")
PAPER = {"gov_report": 0.489, "multi_news": 0.294, "qmsum": 0.152}  # less E2E latency than vLLM, both phases together
SHARES = (0.5,)  # of what the instances could do without any loss
TPOT_S = 0.05
FIXED, FLEXIBLE_BOUND = split(4), "flexible, TPOT bound"
MIXED_BOUND = "mixed, TPOT bound"
OURS, AGGREGATED = (FLEXIBLE, FLEXIBLE_BOUND), (MIXED, MIXED_BOUND, STOCK)
WHOLE_S, QUICK_S = 300.0, 20.0
NO_SLO = Slo()

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    hardware: str
    dataset: str

    @property
    def costs(self) -> list[str]:
        return [f"{MODEL}/{one}" for one in HARDWARE[self.hardware]]

    def rate(self, share: float) -> float:
        return loads.longbench_rate(self.costs, self.dataset, share)


def measure(run: Run) -> Results:
    settings = [Setting(hardware, dataset) for hardware in HARDWARE for dataset in DATASETS]
    seeds = range(1 if run.quick else min(run.seeds, 3))
    cases = [
        _case(run, setting, share, name, seed)
        for setting in settings
        for share in SHARES
        for name in clusters(setting)
        for seed in seeds
    ]
    rows = run.rows("longbench", cases)
    return {
        "tpot_s": TPOT_S, "duration_s": QUICK_S if run.quick else WHOLE_S, "paper_less": PAPER,
        "clusters": {hardware: clusters(Setting(hardware, DATASETS[0])) for hardware in HARDWARE},
        "gains": [gains(found) for found in _groups(rows)], "runs": rows,
    }  # fmt: skip


def clusters(setting: Setting) -> dict[str, configurations.Overrides]:
    free = configurations.base(setting.costs, None, None)
    bound = configurations.base(setting.costs, None, TPOT_S)
    return {
        FIXED: configurations.fixed(free, 4),
        FLEXIBLE: configurations.flexible(free),
        FLEXIBLE_BOUND: configurations.flexible(bound),
        MIXED: configurations.mixed(free),
        MIXED_BOUND: configurations.mixed(bound),
        STOCK: configurations.stock(free),
    }


def _case(run: Run, setting: Setting, share: float, name: str, seed: int) -> Case:
    rate = setting.rate(share)
    load = loads.Longbench(setting.dataset, rate, QUICK_S if run.quick else WHOLE_S, seed)
    key = {"hardware": setting.hardware, "dataset": setting.dataset, "share": share, "rate": rate}
    return Case(name, clusters(setting)[name], load, NO_SLO, seed, key, weight=rate)


# --- what it says --------------------------------------------------------------------------------------------------


def _groups(rows: list[Row]) -> list[list[Row]]:
    return list(summary.group(rows, "hardware", "dataset", "share").values())


def gains(rows: list[Row]) -> Row:
    """Of one shape at one rate: how much less mean E2E latency flexible roles have than the best aggregated server, and
    than each of them. Below zero they have more."""
    e2el = summary.point("e2el_s", "mean")
    means = {name: summary.mean_of(found, e2el) for name, found in summary.group(rows, "configuration").items()}
    ours = summary.best(rows, OURS, e2el, is_least=True)
    theirs = summary.best(rows, AGGREGATED, e2el, is_least=True)
    return {
        **{name: rows[0][name] for name in ("hardware", "dataset", "share", "rate")},
        "e2el_mean_s": means, "ours": ours, "best_aggregated": theirs,
        "less_than_best": 1 - means[ours] / means[theirs],
        "less_than": {name: 1 - means[FLEXIBLE] / means[name] for name in AGGREGATED},
    }  # fmt: skip


_HEADER = (
    "configuration", "E2E mean\ns", "E2E p50\ns", "E2E p99\ns", "TTFT mean\ns", "TPOT mean\nms", "ITL p99\nms", "flips",
)  # fmt: skip


def show(console: Console, results: Results) -> None:
    for rows, gain in zip(_groups(results["runs"]), results["gains"], strict=True):
        title = (
            f"{gain['dataset']} on {gain['hardware']}, {gain['rate']:g} requests/s ({gain['share']:.0%} of what fits)"
        )
        cells = [_cells(name, found) for name, found in summary.group(rows, "configuration").items()]
        print_table(console, _HEADER, cells, title)
        console.print(
            f"E2E mean of {gain['ours']}: {summary.less(gain['less_than_best'])} than {gain['best_aggregated']}, the"
            f" best aggregated; flexible {summary.less(gain['less_than'][STOCK])} than {STOCK}"
            f" (the paper: {results['paper_less'][gain['dataset']]:.1%} less than vLLM)\n"
        )


def _cells(name: str, rows: list[Row]) -> list[str]:
    def mean(spread: str, at: str) -> float:
        return summary.mean_of(rows, summary.point(spread, at))

    return [
        name, *(summary.seconds(mean("e2el_s", at)) for at in ("mean", "p50", "p99")),
        summary.seconds(mean("ttft_s", "mean")), summary.ms(mean("tpot_s", "mean")), summary.ms(mean("itl_s", "p99")),
        f"{summary.mean_of(rows, lambda row: row['num_flips']):.0f}",
    ]  # fmt: skip


def draw(results: Results) -> "Figure":
    hardwares = summary.group(results["gains"], "hardware")
    figure, grid = plots.panels(len(hardwares), len(DATASETS), 3.8, 3.0)
    for axes_row, (hardware, of_hardware) in zip(grid, hardwares.items(), strict=True):
        for axes, (dataset, found) in zip(axes_row, summary.group(of_hardware, "dataset").items(), strict=True):
            names = list(found[0]["e2el_mean_s"])
            colors = plots.colors(names)
            for name in names:
                ys = [gain["e2el_mean_s"][name] for gain in found]
                plots.line(axes, name, colors[name], [gain["rate"] for gain in found], ys)
            axes.set_ylim(bottom=0)
            y = "mean E2E latency, s" if axes is axes_row[0] else ""
            plots.label(axes, f"{dataset}, {hardware}", "requests/s", y)
    plots.legend(figure, grid[0][0])
    return figure
