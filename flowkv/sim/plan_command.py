"""`flowkv plan`: its options, what cannot be planned, and what is said of the plan."""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowkv.config import POLICIES, ClusterConfig, load_config, with_overrides
from flowkv.cost import prefill_pairs
from flowkv.errors import ConfigError, WorkloadError
from flowkv.sim.command import check_writable, show_cost_models
from flowkv.sim.options import add_workload, build_workload, count

if TYPE_CHECKING:
    from flowkv.sim.candidates import Group
    from flowkv.sim.costs import CostModel
    from flowkv.sim.plan import Evaluate, Row
    from flowkv.sim.plan_report import Verdict
    from flowkv.sim.plan_runs import Show
    from flowkv.sim.workload import TraceRequest


_FILE_WIDTH = 140  # of a table that is not for a terminal


@dataclass(frozen=True, slots=True)
class Problem:
    """All that a plan is made for. `groups` of the smallest and of the largest cluster to try; mostly they are one."""

    config: ClusterConfig
    smallest: "list[Group]"
    largest: "list[Group]"
    workloads: "dict[int, Sequence[TraceRequest]]"  # by seed
    policies: list[str]
    target: float
    is_whole: bool  # no short runs first

    @property
    def num_requests(self) -> int:
        return min(map(len, self.workloads.values()))

    @property
    def rate(self) -> float:
        """Requests a second of the workload as it is, the mean over its seeds; infinite if all come at once."""
        rates = [_rate(requests) for requests in self.workloads.values()]
        return sum(rates) / len(rates)

    def shares(self, num_candidates: int) -> list[float]:
        from flowkv.sim.plan import short_runs

        return [] if self.is_whole else short_runs(num_candidates, self.num_requests)


@dataclass(frozen=True, slots=True)
class Plan:
    rows: "list[Row]"
    verdict: "Verdict"


def plan_command(args: argparse.Namespace) -> None:
    """Raises FlowKVError, before anything is simulated, for whatever cannot be planned."""
    if args.list:
        return show_cost_models()
    problem = _problem(args)
    start_s = time.perf_counter()
    plan = _planned(problem, args)
    _tell(problem, plan, args)
    if args.out is not None:
        _write(problem, plan, time.perf_counter() - start_s, args)
    return None


def _rate(requests: "Sequence[TraceRequest]") -> float:
    last_s = requests[-1].arrival_s
    return (len(requests) - 1) / last_s if last_s > 0 else float("inf")


# --- before --------------------------------------------------------------------------------------------------------


def _problem(args: argparse.Namespace) -> Problem:
    from flowkv.sim.candidates import parse_groups

    given = {"slo.ttft_s": args.slo_ttft, "slo.tpot_s": args.slo_tpot}
    config = load_config(args.config, {key: value for key, value in given.items() if value is not None}, args.set)
    _check_options(config, args)
    named = args.cost or ([config.simulate.cost] if isinstance(config.simulate.cost, str) else config.simulate.cost)
    low, high = args.instances or (None, None)
    if low != high and len(parse_groups([*named], high)) > 1:
        raise ConfigError("--instances LOW:HIGH takes one --cost: how many there are of several is in their counts")
    smallest, largest = parse_groups(named, low), parse_groups(named, high)
    costs = _cost_models(config, largest)
    workloads = {args.seed + i: _workload(args, args.seed + i) for i in range(args.seeds)}
    policies = list(dict.fromkeys(args.policies or POLICIES))
    problem = Problem(config, smallest, largest, workloads, policies, args.target, args.whole)
    if args.max_rate and problem.rate == float("inf"):
        raise WorkloadError("--max-rate speeds arrivals up, and all of these requests arrive at once")
    _check_slo(config, costs, workloads)
    return problem


def _check_options(config: ClusterConfig, args: argparse.Namespace) -> None:
    """What the parser cannot see, and what would fail after the run."""
    if not 0 < args.target <= 1:
        raise ConfigError(f"--target is a share of the requests, above 0 and up to 1, not {args.target:g}")
    low, high = args.instances or (1, 1)
    has_target = args.max_rate or low != high
    if has_target and config.slo.ttft_s is None and config.slo.tpot_s is None:
        raise ConfigError("--max-rate and --instances LOW:HIGH need an SLO: give --slo-ttft, --slo-tpot or both")
    if args.max_rate and low != high:
        raise ConfigError("--max-rate finds the rate of one number of instances, not of --instances LOW:HIGH")
    if args.out is not None:
        check_writable(args.out)


def _cost_models(config: ClusterConfig, groups: "Sequence[Group]") -> "list[CostModel]":
    """One for each group. Raises ConfigError for an unknown one, and for those of several models."""
    from flowkv.sim.run import cost_models

    names = {"mixed": len(groups), "prefill": 0, "decode": 0, "simulate.cost": [group.cost for group in groups]}
    return cost_models(with_overrides(config, names))


def _workload(args: argparse.Namespace, seed: int) -> "Sequence[TraceRequest]":
    requests, _ = build_workload(argparse.Namespace(**{**vars(args), "seed": seed}))
    return list(requests)


def _check_slo(
    config: ClusterConfig, costs: "Sequence[CostModel]", workloads: "dict[int, Sequence[TraceRequest]]"
) -> None:
    """Raises ConfigError for bounds that no instance could keep for any request, even with nothing else to do."""
    requests = [request for workload in workloads.values() for request in workload]
    shortest = min(request.num_prompt_tokens for request in requests)
    least = [("slo.ttft_s", config.slo.ttft_s, {cost.name: _prefill_s(cost, config, shortest) for cost in costs})]
    if max(request.num_output_tokens for request in requests) > 1:
        least.append(("slo.tpot_s", config.slo.tpot_s, {cost.name: _decode_s(cost, shortest) for cost in costs}))
    for key, bound_s, seconds in least:
        fastest = min(seconds, key=seconds.__getitem__)
        if bound_s is not None and bound_s < seconds[fastest]:
            raise ConfigError(
                f"{key} of {bound_s:g} s cannot be kept: the shortest prompt, of {shortest} tokens, takes at least"
                f" {seconds[fastest]:.3g} s{'' if key == 'slo.ttft_s' else ' a token'} on an idle {fastest}"
            )


def _prefill_s(cost: "CostModel", config: ClusterConfig, num_tokens: int) -> float:
    from flowkv.sim.costs import StepShape

    seconds = 0.0
    chunk = config.engine.max_batch_tokens
    for start in range(0, num_tokens, chunk):
        size = min(chunk, num_tokens - start)
        seconds += cost.step_s(StepShape(size, prefill_pairs(start, size), 0, 0, int(start + size == num_tokens)))
    return seconds


def _decode_s(cost: "CostModel", num_tokens: int) -> float:
    from flowkv.sim.costs import StepShape

    return cost.step_s(StepShape(0, 0, 1, num_tokens + 1, 1))


# --- the search ----------------------------------------------------------------------------------------------------


def _planned(problem: Problem, args: argparse.Namespace) -> Plan:
    from flowkv.sim.plan_runs import Simulator, simulations

    simulator = Simulator(problem.config, problem.workloads)
    with _progress() as show, simulations(simulator, args.processes, show) as evaluate:
        if problem.smallest != problem.largest:
            return _plan_instances(problem, evaluate)
        return _plan_rate(problem, evaluate) if args.max_rate else _plan_load(problem, evaluate)


def _plan_load(problem: Problem, evaluate: "Evaluate") -> Plan:
    from flowkv.sim.plan_report import verdict_of_load

    rows = _compared(problem, problem.largest, evaluate)
    return Plan(rows, verdict_of_load(rows, _has_slo(problem.config), problem.target))


def _plan_rate(problem: Problem, evaluate: "Evaluate") -> Plan:
    from flowkv.sim.candidates import candidates
    from flowkv.sim.plan import capacities
    from flowkv.sim.plan_report import verdict_of_rates

    tried = candidates(problem.largest, problem.policies)
    rows = capacities(tried, problem.shares(len(tried)), list(problem.workloads), problem.target, evaluate)
    return Plan(rows, verdict_of_rates(rows, problem.rate, problem.target))


def _plan_instances(problem: Problem, evaluate: "Evaluate") -> Plan:
    from flowkv.sim.candidates import Group
    from flowkv.sim.plan import best, fewest
    from flowkv.sim.plan_report import verdict_of_fewest

    (group,) = problem.largest
    low, high = problem.smallest[0].count, group.count
    compared: dict[int, list[Row]] = {}

    def keeps(num_instances: int, is_split: bool) -> bool:
        if num_instances not in compared:
            compared[num_instances] = _compared(problem, [Group(group.cost, num_instances)], evaluate)
        row = best(compared[num_instances], is_split=is_split)
        return row is not None and row.outcome.good_fraction >= problem.target

    num_mixed = fewest(low, high, lambda num: keeps(num, is_split=False))
    num_split = fewest(max(2, low), high, lambda num: keeps(num, is_split=True))
    rows = [row for _, found in sorted(compared.items()) for row in found]
    return Plan(rows, verdict_of_fewest(compared, num_mixed, num_split, problem.target))


def _compared(problem: Problem, groups: "Sequence[Group]", evaluate: "Evaluate") -> "list[Row]":
    from flowkv.sim.candidates import candidates
    from flowkv.sim.plan import compare

    tried = candidates(groups, problem.policies)
    return compare(tried, problem.shares(len(tried)), list(problem.workloads), evaluate)


def _has_slo(config: ClusterConfig) -> bool:
    return config.slo.ttft_s is not None or config.slo.tpot_s is not None


@contextmanager
def _progress() -> "Iterator[Show]":
    """A bar on a terminal that names what runs, a line for each round elsewhere; on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(purpose: str, running: Sequence[Any], num_done: int, num_jobs: int) -> None:
            if not console.is_terminal and num_done == 0:
                console.print(f"flowkv: simulating {purpose}", markup=False)
            names = ", ".join(dict.fromkeys(job.candidate.name for job in running))
            bar.update(task, total=num_jobs, completed=num_done, description=f"{purpose}: {names}")

        yield show


# --- after ---------------------------------------------------------------------------------------------------------


def _commands(problem: Problem, plan: Plan) -> list[str]:
    from flowkv.sim.candidates import serve_commands

    winner = plan.verdict.winner.candidate
    return serve_commands(winner, with_overrides(problem.config, winner.overrides))


def _told_rate(problem: Problem, args: argparse.Namespace) -> float | None:
    return problem.rate if args.max_rate else None


def _tell(problem: Problem, plan: Plan, args: argparse.Namespace) -> None:
    from rich.console import Console

    from flowkv.sim.plan_report import table
    from flowkv.sim.report import print_table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    header, cells = table(plan.rows, _told_rate(problem, args), _has_slo(problem.config))
    hardware = " and ".join(f"{group.count} of {group.cost}" for group in problem.largest)
    up_to = "up to " if problem.smallest != problem.largest else ""
    rate = "at once" if problem.rate == float("inf") else f"{problem.rate:.3g} a second"
    seeds = f"seed {args.seed}" if args.seeds == 1 else f"seeds {args.seed} to {args.seed + args.seeds - 1}"
    title = f"{problem.num_requests} requests, {rate}, on {up_to}{hardware}; {seeds}"
    print_table(console, header, cells, title)
    console.print(plan.verdict.text, style="bold", markup=False, soft_wrap=True)
    for command in _commands(problem, plan):
        console.print(f"  {command}", markup=False, soft_wrap=True)
    for error in plan.verdict.winner.outcome.errors:
        console.print(f"error: {error}", markup=False, soft_wrap=True)


def _write(problem: Problem, plan: Plan, wall_s: float, args: argparse.Namespace) -> None:
    from flowkv import __version__
    from flowkv.sim.plan_report import row_json
    from flowkv.sim.report import write_json

    rate = _told_rate(problem, args)
    options = {name: value for name, value in vars(args).items() if not callable(value)}
    path: Path = args.out / "plan.json"
    content = {
        "version": __version__,
        "wall_s": wall_s,  # this line alone differs from one run to the next
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        "config": problem.config,
        "num_requests": problem.num_requests,
        "requests_per_s": problem.rate,  # null if all come at once
        "verdict": plan.verdict.text,
        "splitting_pays": plan.verdict.pays,
        "commands": _commands(problem, plan),
        "winner": row_json(plan.verdict.winner, rate),
        "rows": [row_json(row, rate) for row in plan.rows],
    }
    write_json(path, content)
    print(f"wrote {path}")


# --- options -------------------------------------------------------------------------------------------------------


def add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="find the cluster that serves a workload best, and whether splitting prefill from decode pays",
        description="Try splits, roles and policies in the simulator, and say which keeps most of a workload within "
        "an SLO and whether splitting pays at all. The same command gives the same plan.",
        epilog="Options win over the configuration file, and --set over both. docs/planning.md: how it searches.",
    )
    plan.set_defaults(command=plan_command)
    add_workload(plan)
    _add_question(plan)
    search = plan.add_argument_group("search")
    search.add_argument(
        "--policies", nargs="+", choices=POLICIES, metavar="POLICY",
        help=f"of placement, to compare: {', '.join(POLICIES)} (default: all)",
    )  # fmt: skip
    search.add_argument("--whole", action="store_true", help="all of the workload for all of them: drop none early")
    search.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and the noise of steps (default: 0)")
    search.add_argument("--seeds", type=count, default=1, metavar="N", help="this and those after it (default: 1)")
    search.add_argument(
        "--processes", type=count, default=len(os.sched_getaffinity(0)), metavar="N",
        help="to simulate in (default: one a core)",
    )  # fmt: skip
    search.add_argument("--out", type=Path, metavar="FOLDER", help="for plan.json")


def _add_question(plan: argparse.ArgumentParser) -> None:
    cluster = plan.add_argument_group("cluster and question")
    cluster.add_argument(
        "--cost", action="append", metavar="NAME[:COUNT]",
        help="what instances run on, as in --list, or a file of flowkv profile; of several kinds with how many there "
        "are of each: llama-3.1-8b/l20:4,h20:4",
    )  # fmt: skip
    cluster.add_argument(
        "--instances", type=_instances, metavar="N|LOW:HIGH", help="how many there are; of a range, how few are enough"
    )
    cluster.add_argument("--slo-ttft", type=float, metavar="S", help="bound on the time to first token")
    cluster.add_argument("--slo-tpot", type=float, metavar="S", help="bound on the time per output token")
    cluster.add_argument(
        "--target", type=float, default=0.99, metavar="SHARE", help="of requests to keep within the SLO (default: 0.99)"
    )
    cluster.add_argument(
        "--max-rate", action="store_true", help="find how fast requests may come while the target is kept"
    )
    cluster.add_argument("--config", type=Path, metavar="FILE", help="TOML file, as for flowkv serve")
    cluster.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of it, such as engine.block_size=32"
    )


def _instances(text: str) -> tuple[int, int]:
    """Bounds, both included."""
    low, _, high = text.partition(":")
    bounds = count(low), count(high or low)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text} begins above its end")
    return bounds
