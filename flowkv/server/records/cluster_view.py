"""`GET /cluster`: the cluster as the controller sees it, in JSON, for `flowkv top` and other programs."""

import msgspec

from flowkv.messages import ClusterStatus
from flowkv.types import InstanceStatus, Regime, RollingRestart


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """As in `messages.ClusterStatus`, and when the frontend heard it.

    Totals of two views divided by the difference of their `time_s` are rates.
    """

    time_s: float  # of the frontend's clock, which begins anywhere
    age_s: float = 0.0  # since then
    model_name: str | None = None
    is_ready: bool = False
    regime: Regime = Regime.NORMAL
    num_flips: int = 0
    num_refused: int = 0
    rolling: RollingRestart = RollingRestart()
    instances: list[InstanceStatus] = []

    @classmethod
    def of(cls, status: ClusterStatus, time_s: float, age_s: float, is_ready: bool) -> "ClusterView":
        return cls(
            time_s=time_s,
            age_s=age_s,
            model_name=None if status.model is None else status.model.name,
            is_ready=is_ready,
            regime=status.regime,
            num_flips=status.num_flips,
            num_refused=status.num_refused,
            rolling=status.rolling,
            instances=status.instances,
        )
