"""All instances together: who could take a request, what is predicted of it there, and who should take which role."""

from collections.abc import Iterable

from flowkv.cluster.columns import Columns
from flowkv.cluster.demand import Demand
from flowkv.cluster.lengths import OutputLengths
from flowkv.cluster.load import Home, InstanceView, PredictionError
from flowkv.cluster.policy import POLICIES, Ask
from flowkv.cluster.roles import Rating, RolePolicy, Verdict
from flowkv.cluster.scheduler import Placement, place
from flowkv.config import SchedulingConfig, SloConfig
from flowkv.cost import LearntCost
from flowkv.messages import LoadReport, Register
from flowkv.types import OutputIds, Request, Role

_HORIZON_S = 5.0  # within which a queue should be gone
_TARGET = 0.85  # of the bound on TPOT, or of a full pool
_RELAXED_STEPS = 1.5  # where there is no bound: how many times as long as one alone a step may take
_MAX_RATING = 1e9  # where nothing comes
_MIN_STEP_S = 1e-3
_MIN_COST_SAMPLES = 3


class Fleet:
    """Views by name, and what is known of the work as a whole."""

    def __init__(self, slo: SloConfig, scheduling: SchedulingConfig) -> None:
        self.views: dict[str, InstanceView] = {}
        self.lengths = OutputLengths()
        self._slo = slo
        self._scheduling = scheduling
        self._policy = POLICIES[scheduling.policy]
        self._columns = Columns()
        self._stale: dict[str, InstanceView] = {}  # whose row is not of now: written when somebody looks
        self._common_cost = LearntCost()  # of all instances: what is believed of one that has shown nothing yet
        self._errors = {role: PredictionError() for role in Role}
        self._demand = Demand()
        self._roles = RolePolicy()

    @property
    def is_flexible(self) -> bool:
        return self._scheduling.roles == "flexible"

    # --- instances -------------------------------------------------------------------------------------------------

    def add(self, message: Register) -> InstanceView:
        view = InstanceView(message, self._slo.max_step_s, self._common_cost, self._errors)
        self.views[view.name] = view
        self._columns.add(view.name)
        self.refresh(view)
        return view

    def remove(self, name: str) -> InstanceView | None:
        view = self.views.pop(name, None)
        if view is not None:
            self._columns.remove(name)
            self._stale.pop(name, None)
        return view

    def refresh(self, view: InstanceView) -> None:
        """Something about it has changed."""
        self._stale[view.name] = view

    def apply(self, report: LoadReport, now_s: float) -> bool:
        """True if the report proves a flip."""
        view = self.views[report.instance]
        has_flipped = view.apply(report, now_s)
        for step in report.steps:
            self._common_cost.learn_step(step)
        self.refresh(view)
        return has_flipped

    # --- requests --------------------------------------------------------------------------------------------------

    def ask(self, request: Request, output_ids: OutputIds | None = None) -> Ask:
        """`output_ids`: of a request that goes on after them, which are computed like a prompt."""
        sampling, num_prompt_tokens = request.sampling, len(request.prompt_ids)
        num_out = max(map(len, output_ids.values())) if output_ids else 0
        num_output_tokens = self.lengths.predict(num_prompt_tokens, sampling.max_tokens)
        return Ask(
            num_prompt_tokens=num_prompt_tokens + num_out,
            num_output_tokens=max(1, num_output_tokens - num_out),
            num_choices=len(output_ids) if output_ids else sampling.n,
            max_total_tokens=request.max_total_tokens,
            priority=request.priority,
            is_deferred=request.is_deferred,
            slo=self._slo,
        )

    def place(self, ask: Ask, request: Request, *, is_begun: bool = False) -> Placement | None:
        """None if no instance that takes requests can hold it. One that has begun is computed where it decodes."""
        for view in self._stale.values():
            self._columns.write(view.name, view.row())
        self._stale.clear()
        is_short = request.sampling.max_tokens <= 1
        return place(
            ask, self._columns, self._policy, is_flexible=self.is_flexible, is_short=is_short, is_begun=is_begun
        )

    def come(self, ask: Ask, now_s: float) -> None:
        """Count a request, whatever becomes of it, as demand."""
        self._demand.add(ask.num_prompt_tokens, ask.num_output_tokens * ask.num_choices, now_s)

    def adopt(self, request: Request, ask: Ask, name: str) -> None:
        """Count a request that runs there already."""
        view = self.views[name]
        view.add_home(request.request_id, _home(ask))
        self.refresh(view)

    def assign(self, request: Request, ask: Ask, placement: Placement, now_s: float) -> int:
        """Count a request that is being sent to its place; its dispatch sequence number there."""
        prefill = self.views[placement.prefill]
        sequence = prefill.dispatched(request, ask.num_prompt_tokens, placement.ttft_s, now_s)
        home = self.views[placement.decode[0]] if placement.decode else prefill
        is_near = not request.is_deferred  # nobody knows when such a one will come
        home.add_home(request.request_id, _home(ask) if is_near else Home(0.0, 0))
        self.refresh(prefill)
        self.refresh(home)
        return sequence

    def move_home(self, request_id: str, source: str, target: str) -> None:
        """It decodes elsewhere than was thought."""
        if source == target or (view := self.views.get(source)) is None:
            return
        home = view.homes.get(request_id)
        self._leave(request_id, source)
        if home is not None and (taker := self.views.get(target)) is not None:
            taker.add_home(request_id, home)
            self.refresh(taker)

    def forget(self, request_id: str, prefill: str, home: str) -> None:
        """It is over, or is to be placed again."""
        if (view := self.views.get(prefill)) is not None:
            view.forget(request_id)
        self._leave(request_id, home)

    def _leave(self, request_id: str, name: str) -> None:
        if (view := self.views.get(name)) is not None:
            view.remove_home(request_id)
            self.refresh(view)

    # --- roles -----------------------------------------------------------------------------------------------------

    def look(self, now_s: float) -> Verdict:
        """At the whole cluster, at a beat."""
        verdict = self._roles.look(list(self._ratings(now_s)))
        return verdict if self.is_flexible else Verdict(verdict.regime, [], verdict.scale)

    def _ratings(self, now_s: float) -> Iterable[Rating]:
        views = [view for view in self.views.values() if view.is_available]
        num_queued = sum(view.queued_tokens for view in views)
        num_decoding = sum(view.load.num_decoding for view in views)
        prompt_tokens_per_s = self._demand.prompt_tokens_per_s(now_s) + num_queued / _HORIZON_S
        mean_prompt = max(1.0, self._demand.mean_prompt_tokens(now_s))
        mean_held = max(mean_prompt, self._demand.mean_held_tokens(now_s))
        output_tokens_per_s = self._demand.output_tokens_per_s(now_s)
        for view in views:
            prefill_per_s = mean_prompt / max(1e-9, view.prompt_s(int(mean_prompt)))
            step_s = self._target_step_s(view, mean_held)
            choices = _TARGET * view.decode_capacity(step_s, mean_held)
            by_rate = choices / step_s / output_tokens_per_s if output_tokens_per_s > 0 else _MAX_RATING
            by_number = choices / num_decoding if num_decoding else _MAX_RATING
            prefill = _TARGET * prefill_per_s / prompt_tokens_per_s if prompt_tokens_per_s > 0 else _MAX_RATING
            load = view.queued_tokens + view.load.num_decoding
            yield Rating(view.name, view.role, prefill, min(by_rate, by_number), load, self._may_flip(view, now_s))

    def _target_step_s(self, view: InstanceView, mean_held: float) -> float:
        if self._slo.tpot_s is not None:
            return max(_MIN_STEP_S, _TARGET * self._slo.tpot_s)
        return max(_MIN_STEP_S, _RELAXED_STEPS * view.cost.step_s(0, 0, 1, mean_held))

    def _may_flip(self, view: InstanceView, now_s: float) -> bool:
        has_proved = view.role is view.wanted_role
        return has_proved and now_s - view.flipped_s >= self._scheduling.dwell_s and self.knows_costs

    @property
    def knows_costs(self) -> bool:
        """Enough steps were seen for predictions to mean something."""
        return self._common_cost.num_samples >= _MIN_COST_SAMPLES

    def to_retire(self) -> InstanceView | None:
        """Who holds least, of those that are not the last of their role; None if nobody can go.

        Where roles are flexible the last but one may go whatever its role: the other then does both.
        """
        views = [view for view in self.views.values() if view.is_available]
        roles = [view.wanted_role for view in views]

        def is_spare(view: InstanceView) -> bool:
            is_last = roles.count(view.wanted_role) == 1 and Role.MIXED not in roles
            return len(views) > 1 and (not is_last or (self.is_flexible and len(views) == 2))

        return min(filter(is_spare, views), key=lambda view: len(view.homes) + view.queued_tokens, default=None)


def _home(ask: Ask) -> Home:
    """Halfway through its output."""
    return Home(ask.num_prompt_tokens + ask.num_choices * ask.num_output_tokens / 2, ask.num_choices)
