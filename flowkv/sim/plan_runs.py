"""The simulations of a plan, one after another or in several processes."""

import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

from flowkv.child import without_cwd
from flowkv.config import ClusterConfig, with_overrides
from flowkv.errors import SimulationError
from flowkv.sim import report, run
from flowkv.sim.figures import Slo, figures
from flowkv.sim.plan import Evaluate, Job, Outcome
from flowkv.sim.workload import TraceRequest, scaled

_MAX_ERRORS = 3

Show = Callable[[str, Sequence[Job], int, int], None]
"""Told what runs: (purpose, the next jobs, how many are done, of how many)."""


@dataclass(frozen=True, slots=True)
class Simulator:
    """`config` is what all candidates share; a workload for each seed."""

    config: ClusterConfig
    workloads: dict[int, Sequence[TraceRequest]]

    def run(self, job: Job) -> Outcome:
        config = with_overrides(self.config, job.candidate.overrides)
        requests = self.workloads[job.seed]
        part = requests[: math.ceil(job.share * len(requests))]
        try:
            result = run.simulate(config, scaled(part, 1.0, job.speedup), seed=job.seed)
        except SimulationError as error:
            raise SimulationError(f"{job.candidate.name}: {error}") from error
        found = figures(result, Slo(config.slo.ttft_s, config.slo.tpot_s))

        def of(spread: str, point: str) -> float | None:
            return None if found[spread] is None else float(found[spread][point])

        return Outcome(
            num_requests=len(part),
            good_fraction=found["good_fraction"],
            goodput_per_s=found["goodput_per_s"],
            ttft_mean_s=of("ttft_s", "mean"),
            ttft_p99_s=of("ttft_s", "p99"),
            tpot_p99_s=of("tpot_s", "p99"),
            e2el_mean_s=of("e2el_s", "mean"),
            num_flips=len(result.flips),
            errors=tuple(report.errors(result.records)[:_MAX_ERRORS]),
        )


@contextmanager
def simulations(simulator: Simulator, num_processes: int, show: Show) -> Iterator[Evaluate]:
    """Runs jobs, in so many processes; none of them is left when the context ends, however it ends."""
    if num_processes == 1:
        yield lambda jobs, purpose: _in_turn(simulator, jobs, purpose, show)
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(simulator,)
    )
    try:
        with without_cwd():
            yield lambda jobs, purpose: _side_by_side(executor, jobs, purpose, show)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()


def _in_turn(simulator: Simulator, jobs: Sequence[Job], purpose: str, show: Show) -> list[Outcome]:
    outcomes = []
    for i, job in enumerate(jobs):
        show(purpose, [job], i, len(jobs))
        outcomes.append(simulator.run(job))
    show(purpose, [], len(jobs), len(jobs))
    return outcomes


def _side_by_side(executor: ProcessPoolExecutor, jobs: Sequence[Job], purpose: str, show: Show) -> list[Outcome]:
    waiting: dict[Future[Outcome], Job] = {executor.submit(_run, job): job for job in jobs}
    futures = list(waiting)
    show(purpose, list(waiting.values()), 0, len(jobs))
    try:
        for future in as_completed(futures):
            future.result()
            del waiting[future]
            show(purpose, list(waiting.values()), len(jobs) - len(waiting), len(jobs))
    except BrokenProcessPool:
        raise SimulationError(
            "a process that simulates has died, perhaps for want of memory: try fewer --processes"
        ) from None
    return [future.result() for future in futures]


# --- in the processes ----------------------------------------------------------------------------------------------

_simulators: list[Simulator] = []  # that of this process


def _begin(simulator: Simulator) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: who started this one ends it
    _simulators[:] = [simulator]


def _run(job: Job) -> Outcome:
    return _simulators[0].run(job)
