"""Who is turned away when there is more work than can be done: at once, with a time to come back, and at no cost."""

from collections.abc import Iterable

from flowkv.cluster.load import InstanceView
from flowkv.cluster.policy import Ask
from flowkv.cluster.scheduler import Placement
from flowkv.config import SchedulingConfig, SloConfig
from flowkv.messages import Rejected

_MIN_RETRY_S = 1.0
_HOPELESS = 0.95  # of the bound: predictions err
_MARGIN = 0.8  # of it, where admission lets in whatever just fits, so that all of those would be late by any error
_LATER_PRIORITY = 0.5  # of the bound is what requests of a priority above 0 may use: the rest is kept for others


class Overload:
    """Admission: by the KV that is promised already, and by the predicted TTFT where an SLO has a bound on it."""

    def __init__(self, slo: SloConfig, scheduling: SchedulingConfig) -> None:
        self._slo = slo
        self._kv_budget = scheduling.kv_budget
        self.num_refused = 0

    def refusal(
        self, request_id: str, ask: Ask, placement: Placement, views: Iterable[InstanceView], knows_costs: bool
    ) -> Rejected | None:
        """Why a request is not let in; None if it is. `placement` is the best that there is for it.

        While nothing is known of costs nobody is refused for being late, or nothing would ever be learnt.
        """
        views = list(views)
        reason = (self._late(ask, placement, views) if knows_costs else None) or self._no_room(ask, views)
        if reason is None:
            return None
        self.num_refused += 1
        text, retry_after_s = reason
        return Rejected(request_id, 429, text, "overloaded", None, max(_MIN_RETRY_S, retry_after_s))

    def is_hopeless(self, placement: Placement) -> bool:
        """Whether a request will miss the SLO, as it seems, wherever it is placed, and is to wait behind all others.

        With admission none is: it would have been refused.
        """
        bound_s, may_wait = self._slo.ttft_s, self._slo.late_last and not self._slo.admission
        return may_wait and bound_s is not None and placement.ttft_s > _HOPELESS * bound_s

    def _late(self, ask: Ask, placement: Placement, views: list[InstanceView]) -> tuple[str, float] | None:
        bound_s = self._slo.ttft_s
        if not self._slo.admission or bound_s is None:
            return None
        allowed_s = bound_s * (_LATER_PRIORITY if ask.priority > 0 else 1.0)
        ttft_s = placement.ttft_s + _place_s(ask, placement, views)
        if ttft_s <= _MARGIN * allowed_s:
            return None
        text = f"overloaded: the first token would take {ttft_s:.1f} s, where {allowed_s:.1f} s are promised"
        return text, ttft_s - allowed_s

    def _no_room(self, ask: Ask, views: Iterable[InstanceView]) -> tuple[str, float] | None:
        if not self._kv_budget:
            return None
        promised = pools = 0.0
        for view in views:
            promised += view.home_tokens
            pools += view.pool_tokens
        wanted = ask.num_prompt_tokens + ask.num_choices * ask.num_output_tokens
        if promised + wanted <= self._kv_budget * pools:
            return None
        return "overloaded: the KV of the requests that were accepted takes all that may be promised", _MIN_RETRY_S


def _place_s(ask: Ask, placement: Placement, views: list[InstanceView]) -> float:
    """Until so many choices have ended as are in its way, in numbers or with their KV.

    Of all instances together: what one has no place for goes to another, or stays where its prompt was computed.
    """
    num_choices = float(ask.num_choices)
    num_tokens = ask.num_prompt_tokens + ask.num_choices * ask.num_output_tokens
    most_choices = most_tokens = 0.0
    for view in views:
        if view.is_available:
            num_choices += max(view.home_choices, view.load.num_decoding)
            num_tokens += view.home_tokens
            most_choices += view.max_choices
            most_tokens += view.usable_tokens
    excess = max(num_choices / most_choices, num_tokens / most_tokens) - 1.0
    return max(0.0, excess) * ask.num_output_tokens * placement.tpot_s
