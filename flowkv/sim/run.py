"""A workload through a simulated cluster, from the first arrival to the last token."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import sub

from flowkv.config import ClusterConfig, SimulateConfig, with_overrides
from flowkv.errors import ConfigError, SimulationError
from flowkv.messages import Accepted, ClusterStatus, Message, Outputs, Rejected, Submit
from flowkv.sim.chrome import Recorder
from flowkv.sim.cluster import SimCluster
from flowkv.sim.costs import CostModel, FittedCost, cost_model
from flowkv.sim.figures import Distribution, InstanceSample, Record, Sample, SimResult
from flowkv.sim.workload import TraceRequest
from flowkv.sim.world import CONTROLLER, FRONTEND
from flowkv.types import Request, SamplingParams

_SAMPLE_S = 1.0
_MANY, _SELDOM_S = 64, 30.0  # instances, beyond which the cluster is looked at so often
_STUCK_S = 3600.0  # virtual, without a token: something is wrong
_MAX_BUFFERED_GAPS = 20_000


def simulate(
    config: ClusterConfig,
    requests: Iterable[TraceRequest],
    *,
    seed: int = 0,
    coalesce: bool = True,
    on_progress: Callable[[float, int], None] | None = None,
    recorder: Recorder | None = None,
    costs: Sequence[CostModel] | None = None,
) -> SimResult:
    """What every request saw. The same arguments give the same result, bit for bit.

    `requests` come by arrival; those that no instance could hold are refused, as a server would. `coalesce` lets steps
    that only decode pass as one event, which changes no figure. `on_progress` is told (virtual seconds, requests done)
    now and then. ConfigError if the cost models do not fit the cluster.
    """
    with _without_collections():
        costs = costs or cost_models(config)
    return _Run(_as_measured(config, costs), requests, costs, seed, coalesce, on_progress, recorder).run()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Nothing in a run refers to itself, so looking for cycles finds none, however many instances there are to look
    through: on a thousand of them that takes longer than all else."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cost_models(config: ClusterConfig) -> list[CostModel]:
    """One for each instance, in the order of `config.roles`."""
    names = config.simulate.cost
    if isinstance(names, str):
        return [cost_model(names)] * len(config.roles)
    if len(names) != len(config.roles):
        raise ConfigError(f"simulate.cost names {len(names)} cost models for {len(config.roles)} instances")
    models = [cost_model(name) for name in names]
    served = {model.model for model in models}
    if len(served) > 1:
        raise ConfigError(f"simulate.cost names several models ({', '.join(sorted(served))}): a cluster serves one")
    return models


def _as_measured(config: ClusterConfig, costs: Sequence[CostModel]) -> ClusterConfig:
    """With the links, the message time and the noise of a profile, where the configuration has the defaults."""
    profile = next((cost.profile for cost in costs if isinstance(cost, FittedCost)), None)
    if profile is None:
        return config
    defaults = SimulateConfig()
    names = [key.partition(".")[2] for key in profile.overrides]
    unset = {name for name in names if getattr(config.simulate, name) == getattr(defaults, name)}
    measured = {key: value for key, value in profile.overrides.items() if key.partition(".")[2] in unset}
    return with_overrides(config, measured)


class _Run:
    """The frontend and the clients: it submits, and writes down what comes back."""

    def __init__(
        self,
        config: ClusterConfig,
        requests: Iterable[TraceRequest],
        costs: Sequence[CostModel],
        seed: int,
        coalesce: bool,
        on_progress: Callable[[float, int], None] | None,
        recorder: Recorder | None,
    ) -> None:
        self._config = config
        self._requests: Iterator[TraceRequest] = iter(requests)
        self._cluster = SimCluster(config, costs, seed, coalesce, self._hear, self._put_out, recorder)
        self._loop = self._cluster.loop
        self._on_progress = on_progress
        self._message_s = config.simulate.message_s
        self._records: list[Record] = []
        self._last_s: dict[str, float] = {}  # time of the last token, of requests that run
        self._by_id: dict[str, Record] = {}
        self._is_over = False  # no request is left to submit
        self._num_done = 0
        self._began_s: float | None = None
        self._finished_s = 0.0
        self._progress_s = 0.0
        self._itl = Distribution()
        self._gaps_s: list[float] = []
        self._shared_gaps_s: dict[int, list[float]] = {}  # by how many outputs had each
        self._samples: list[Sample] = []

    def run(self) -> SimResult:
        while not self._is_over or self._by_id:
            if not self._loop.step():
                raise AssertionError("an event loop with beats has no end")
            if self._loop.now_s - self._progress_s > _STUCK_S and self._by_id:
                raise SimulationError(f"nothing has come of {', '.join(list(self._by_id)[:5])} for {_STUCK_S:.0f} s")
        self._itl.add(self._gaps_s)
        for num_outputs, gaps_s in self._shared_gaps_s.items():
            self._itl.add(gaps_s, num_outputs)
        began_s = self._began_s or 0.0
        return SimResult(
            records=self._records,
            itl=self._itl,
            duration_s=self._finished_s - began_s,
            samples=self._samples,
            flips=[flip._replace(time_s=flip.time_s - began_s) for flip in self._cluster.controller.roster.flips],
            counters={name: instance.engine.counters for name, instance in self._cluster.instances.items()},
            num_events=self._loop.num_events,
        )

    # --- requests --------------------------------------------------------------------------------------------------

    def _arrive(self, request: TraceRequest) -> None:
        record = Record(
            index=len(self._records), arrival_s=self._loop.now_s - (self._began_s or 0.0),
            num_prompt_tokens=request.num_prompt_tokens, num_output_tokens=0,
        )  # fmt: skip
        self._records.append(record)
        request_id = str(record.index)
        self._by_id[request_id] = record
        self._progress_s = self._loop.now_s
        sampling = SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0)
        submitted = Request(
            request_id=request_id, prompt_ids=range(request.num_prompt_tokens), sampling=sampling,
            priority=request.priority,
        )  # fmt: skip
        self._cluster.send(FRONTEND, CONTROLLER, Submit(FRONTEND, submitted))
        self._next_arrival()

    def _next_arrival(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._is_over = True
        else:
            assert self._began_s is not None
            self._loop.at(self._began_s + request.arrival_s, self._arrive, request)

    def _hear(self, message: Message) -> None:
        match message:
            case ClusterStatus(ready=True) if self._began_s is None:
                self._began_s = self._loop.now_s
                if self._cluster.recorder is not None:
                    self._cluster.recorder.origin_s = self._began_s
                self._sample()
                self._next_arrival()
            case Rejected():
                self._finish(message.request_id, self._loop.now_s, message)
            case _:
                assert isinstance(message, Accepted | ClusterStatus)

    def _put_out(self, outputs: Outputs, times_s: Sequence[float]) -> None:
        """All tokens of one batch: those of one output came one a step, the last in the last."""
        self._progress_s = self._loop.now_s
        num_whole = 0
        for output in outputs.outputs:
            request_id, count = output.request_id, len(output.token_ids)
            record = self._by_id.get(request_id)
            if record is None:
                continue
            first_s = times_s[-count] + self._message_s
            last_s = times_s[-1] + self._message_s
            if record.num_output_tokens == 0:
                record.ttft_s = first_s - record.arrival_s - (self._began_s or 0.0)
                record.prefill_instance = outputs.instance
            else:
                self._gaps_s.append(first_s - self._last_s[request_id])
            num_whole += count > 1 and count == len(times_s)
            record.num_output_tokens += count
            record.decode_instance = outputs.instance
            self._last_s[request_id] = last_s
            if output.finish_reason is not None:
                self._finish(request_id, last_s, None)
        if num_whole:
            gaps_s = self._shared_gaps_s.setdefault(num_whole, [])
            gaps_s += map(sub, times_s[1:], times_s)
            if len(gaps_s) > _MAX_BUFFERED_GAPS:
                self._itl.add(gaps_s, num_whole)
                gaps_s.clear()
        if len(self._gaps_s) > _MAX_BUFFERED_GAPS:
            self._itl.add(self._gaps_s)
            self._gaps_s = []

    def _finish(self, request_id: str, now_s: float, rejected: Rejected | None) -> None:
        record = self._by_id.pop(request_id, None)
        if record is None:
            return
        self._last_s.pop(request_id, None)
        record.e2el_s = now_s - record.arrival_s - (self._began_s or 0.0)
        if rejected is not None:
            record.error = rejected.message
            record.is_refused = rejected.status == 429
        self._finished_s = max(self._finished_s, now_s)
        self._num_done += 1

    def _sample(self) -> None:
        now_s = self._loop.now_s - (self._began_s or 0.0)
        controller = self._cluster.controller
        instances = {
            name: InstanceSample(role, load.waiting_tokens, load.num_decoding, load.used_blocks / num_blocks)
            for name, role, load, num_blocks in controller.loads()
        }
        self._samples.append(Sample(now_s, instances, controller.roster.regime))
        if self._on_progress is not None:
            self._on_progress(now_s, self._num_done)
        self._loop.after(_SAMPLE_S if len(instances) <= _MANY else _SELDOM_S, self._sample)
