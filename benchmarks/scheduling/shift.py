"""A load that wants one split now and the opposite five minutes later, at rates about the knee.

8 instances; 24 requests/s of 8,000 tokens in and 100 out, then 40 requests/s of 500 in and 1,000 out, in turns of 300 s
for 1,800 s, both rates times a scale. Fixed splits, which serve in the order of arrival as such clusters do, run with
one seed, all mixed and flexible roles with all seeds. One split runs once more under our own rule that what is late
anyway comes last.
"""

from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.report import print_table
from benchmarks.scheduling import configurations, plots, summary
from benchmarks.scheduling.cases import Case, Row, Run
from benchmarks.scheduling.configurations import FLEXIBLE, MIXED, split
from benchmarks.scheduling.loads import Shift
from flowkv.sim.figures import Slo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "shift"
COST = "llama-3.1-8b/a100"
SLO = Slo(ttft_s=2.0, tpot_s=0.025)
SCALES = (0.15, 0.21, 0.26, 0.30, 0.32, 0.34, 0.36, 0.40)
SPLITS = {split(n): n for n in (5, 6, 7)}
LATE_LAST = {f"{split(6)}, late last": 6}
SHIFT_S, WHOLE_S = 300.0, 1800.0
QUICK_SCALES, QUICK_SHIFT_S, QUICK_WHOLE_S = (0.20, 0.40), 15.0, 30.0

WITHIN = 0.01  # of the best other configuration, at every scale
KNEE_GOOD, KNEE_OTHER = 0.98, 0.80  # at the knee: at least, and under

Results = dict[str, Any]


def measure(run: Run) -> Results:
    options = clusters()
    scales = QUICK_SCALES if run.quick else SCALES
    rows = run.rows("shift, seed 0", [_case(run, name, scale, 0) for scale in scales for name in options])
    again = [
        _case(run, name, scale, seed) for scale in scales for name in (FLEXIBLE, MIXED) for seed in range(1, run.seeds)
    ]
    rows += run.rows("shift, other seeds", again)
    lengths = {"phase_s": QUICK_SHIFT_S, "duration_s": QUICK_WHOLE_S} if run.quick else {}
    return {
        "slo": {"ttft_s": SLO.ttft_s, "tpot_s": SLO.tpot_s}, "phase_s": SHIFT_S, "duration_s": WHOLE_S, **lengths,
        "clusters": options, "scales": summarize(rows), "verdict": judge(summarize(rows)), "runs": rows,
    }  # fmt: skip


def clusters() -> dict[str, configurations.Overrides]:
    base = configurations.base(COST, SLO.ttft_s, SLO.tpot_s)
    in_order = base | {"slo.late_last": False}
    return {
        **{name: configurations.fixed(in_order, num_prefill) for name, num_prefill in SPLITS.items()},
        **{name: configurations.fixed(base, num_prefill) for name, num_prefill in LATE_LAST.items()},
        MIXED: configurations.mixed(base),
        FLEXIBLE: configurations.flexible(base),
    }


def _case(run: Run, name: str, scale: float, seed: int) -> Case:
    phase_s, whole_s = (QUICK_SHIFT_S, QUICK_WHOLE_S) if run.quick else (SHIFT_S, WHOLE_S)
    load = Shift(scale, seed, phase_s, whole_s)
    return Case(name, clusters()[name], load, SLO, seed, {"scale": scale}, phase_s, weight=scale)


# --- what it says --------------------------------------------------------------------------------------------------


def summarize(rows: list[Row]) -> list[Row]:
    """One row a scale: each configuration's share of requests within the SLO (over seeds, and by phase), and how far
    flexible roles are ahead of the best other one that ran with the same seeds, over all of these seeds."""
    return [_scale(scale, found) for scale, found in summary.group(rows, "scale").items()]


def _scale(scale: float, rows: list[Row]) -> Row:
    by_name = summary.group(rows, "configuration")
    split_name = summary.best([row for row in rows if row["seed"] == 0], SPLITS, summary.good)
    good = {name: summary.over_seeds(found, summary.good) for name, found in by_name.items()}
    others = [name for name in (split_name, *LATE_LAST, MIXED) if name in good]
    other = max(others, key=lambda name: good[name].mean)
    seeds = {row["seed"] for row in by_name[other]}
    same = summary.over_seeds([row for row in by_name[FLEXIBLE] if row["seed"] in seeds], summary.good)
    return {
        "scale": scale,
        "best_split": split_name,
        "best_other": other,
        "ahead": same.mean - good[other].mean,
        "configurations": {
            name: {
                "seeds": len(found), "good": good[name]._asdict(),
                "phases": [sum(values) / len(values) for values in zip(*(r["phases"] for r in found), strict=False)],
                "itl_p99_s": summary.mean_of(found, summary.point("itl_s", "p99")),
                "goodput_per_s": summary.mean_of(found, summary.goodput),
                "num_flips": summary.mean_of(found, lambda row: row["num_flips"]),
            }
            for name, found in by_name.items()
        },
    }  # fmt: skip


def judge(scales: list[Row]) -> Row:
    """The knee is the highest scale at which flexible roles keep `KNEE_GOOD` of the requests within the SLO."""
    kept = [row for row in scales if _good(row, FLEXIBLE) >= KNEE_GOOD]
    behind = [row["scale"] for row in scales if row["ahead"] < -WITHIN]
    knee = max(kept, key=lambda row: float(row["scale"]), default=None)
    best_fixed = None if knee is None else _good(knee, knee["best_split"])
    return {
        "is_never_behind": not behind,
        "behind_at": behind,
        "knee": None if knee is None else knee["scale"],
        "flexible_at_knee": None if knee is None else _good(knee, FLEXIBLE),
        "best_fixed_at_knee": best_fixed,
        "is_knee_met": best_fixed is not None and best_fixed < KNEE_OTHER,
    }


def _good(row: Row, name: str) -> float:
    return float(row["configurations"][name]["good"]["mean"])


def show(console: Console, results: Results) -> None:
    scales = results["scales"]
    names = list(results["clusters"])
    rows = [
        [
            f"{row['scale']:.2f}",
            *(summary.ranged(summary.Range(**row["configurations"][name]["good"])) for name in names),
            f"{100 * row['ahead']:+.1f}", summary.verdict(row["ahead"] >= -WITHIN),
        ]
        for row in scales
    ]  # fmt: skip
    print_table(console, ("scale", *names, "ahead", "within 1 %"), rows, "Shift: percent of requests within the SLO")
    itl = [
        [f"{row['scale']:.2f}", *(summary.ms(row["configurations"][name]["itl_p99_s"]) for name in names)]
        for row in scales
    ]
    print_table(console, ("scale", *names), itl, "ITL p99, ms")
    by_phase = [
        [
            f"{row['scale']:.2f}",
            *(" ".join(f"{100 * x:.0f}" for x in row["configurations"][n]["phases"]) for n in names),
        ]
        for row in scales
    ]
    print_table(console, ("scale", *names), by_phase, "Percent within the SLO, phase by phase")
    _show_verdict(console, results["verdict"])


def _show_verdict(console: Console, found: Row) -> None:
    console.print(f"within 1 % of the best other at every rate: {summary.verdict(found['is_never_behind'])}")
    if found["knee"] is None:
        console.print(f"no rate at which flexible roles reach {KNEE_GOOD:.0%}: {summary.verdict(False)}")
        return
    console.print(
        f"knee at a scale of {found['knee']:.2f}: flexible {found['flexible_at_knee']:.1%}, best fixed split"
        f" {found['best_fixed_at_knee']:.1%} (wanted: at least {KNEE_GOOD:.0%}, under {KNEE_OTHER:.0%}):"
        f" {summary.verdict(found['is_knee_met'])}"
    )


def draw(results: Results) -> "Figure":
    figure, ((left, right),) = plots.panels(1, 2, 5.4, 4.0)
    names = list(results["clusters"])
    colors = plots.colors(names)
    xs = [row["scale"] for row in results["scales"]]
    for name in names:
        found = [row["configurations"][name] for row in results["scales"]]
        plots.line(left, name, colors[name], xs, [100 * one["good"]["mean"] for one in found])
        lows, highs = ([100 * one["good"][end] for one in found] for end in ("low", "high"))
        left.fill_between(xs, lows, highs, color=colors[name], alpha=0.15, lw=0)
        plots.line(right, name, colors[name], xs, [one["itl_p99_s"] for one in found], 1e3)
    left.set_ylim(0, 103)
    plots.limit(right, 1e3 * results["slo"]["tpot_s"], "SLO of TPOT")
    plots.label(left, "Requests within the SLO", "arrival rates, of 24 and 40 a second", "%")
    plots.label(right, "ITL p99", "arrival rates, of 24 and 40 a second", "ms")
    right.set_ylim(bottom=0)
    plots.legend(figure, left)
    return figure
