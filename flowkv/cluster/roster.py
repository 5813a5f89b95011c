"""Who is to run, and in which role: flips, scale, drains and restarts, asked of instances and of their launcher."""

from collections.abc import Callable, Sequence

from flowkv.cluster.fleet import Fleet
from flowkv.cluster.load import InstanceView
from flowkv.cluster.nodes import node_name
from flowkv.cluster.roles import Flip
from flowkv.cluster.rolling import Rolling
from flowkv.config import RestartConfig, SchedulingConfig
from flowkv.messages import (
    RESTART_MARK,
    Drain,
    InstanceExited,
    Message,
    RestartInstance,
    SetRole,
    StartInstance,
    StopInstance,
)
from flowkv.types import Regime, Role, RollingRestart


class Roster:
    """`num_instances` run or are being started on this node, if nobody else starts any. With `launcher_address` None
    nobody starts or stops instances, and only roles are set.
    """

    def __init__(
        self,
        fleet: Fleet,
        scheduling: SchedulingConfig,
        restart: RestartConfig,
        drain_timeout_s: float,
        num_instances: int,
        launcher_address: str | None,
        send: Callable[[str, Message], None],
    ) -> None:
        self._fleet = fleet
        self._views = fleet.views
        self._scheduling = scheduling
        self._kills_hung = restart.hung
        self._rolling = Rolling(drain_timeout_s, self._drain, self._restart)
        self._num_wanted = num_instances  # on this node
        self._launcher_address = launcher_address
        self._send = send
        self._roles_due_s = 0.0
        self.regime = Regime.NORMAL
        self.flips: list[Flip] = []

    def look(self, now_s: float) -> None:
        """Called often."""
        self._rolling.look(self._views, now_s)
        if now_s >= self._roles_due_s:
            self._roles_due_s = now_s + self._scheduling.interval_s
            self._set_roles(now_s)

    @property
    def rolling(self) -> RollingRestart:
        return self._rolling.status()

    # --- what operators ask for ------------------------------------------------------------------------------------

    def flip(self, name: str, role: Role, now_s: float) -> None:
        """Nothing, if it has ended."""
        if (view := self._views.get(name)) is not None:
            self._set_role(view, role, now_s)

    def restart_in_turn(self, names: Sequence[str], token: str = "") -> None:
        self._rolling.ask(names, token)

    def retire(self, name: str) -> None:
        """It finishes what it has, and is ended for good."""
        self._rolling.forget(name)
        if (view := self._views.get(name)) is not None and not view.is_draining:
            self._drain(view)

    # --- what instances do -----------------------------------------------------------------------------------------

    def flipped(self, view: InstanceView, old: Role, now_s: float) -> None:
        view.num_flips += 1
        self.flips.append(Flip(now_s, view.name, old, view.role, self.regime))

    def reported(self, view: InstanceView) -> None:
        """One that was to finish what it has may have done so."""
        if view.holds_nothing and view.is_draining and not view.is_stopping and not self._rolling.holds(view.name):
            self._stop(view)

    def hangs(self, view: InstanceView) -> None:
        if self._kills_hung and self._launcher_address is not None:
            self._send(self._launcher_address, RestartInstance(view.name, hangs=True))

    def exited(self, message: InstanceExited) -> None:
        if message.is_final:
            self._rolling.forget(message.instance)

    def did_not_start(self, name: str) -> None:
        """It never came: one that was added is wanted no more; one that was restarted still is."""
        if RESTART_MARK not in name:
            self._want_fewer(name)

    # --- roles and scale -------------------------------------------------------------------------------------------

    def _set_roles(self, now_s: float) -> None:
        verdict = self._fleet.look(now_s)
        self.regime = verdict.regime
        for name, role in verdict.flips:
            self._set_role(self._views[name], role, now_s)
        if verdict.scale > 0:
            self._scale_out()
        elif verdict.scale < 0 and not self._rolling.is_active:
            self._scale_in()

    def _set_role(self, view: InstanceView, role: Role, now_s: float) -> None:
        view.wanted_role, view.flipped_s = role, now_s
        self._fleet.refresh(view)
        self._send(view.peer.address, SetRole(role))

    def _scale_out(self) -> None:
        """Ask for one more, of the role that there is less of."""
        num_joined = sum(node_name(name) is not None for name in self._views)
        num_own = max(len(self._views) - num_joined, self._num_wanted)
        if self._launcher_address is None or num_own + num_joined >= self._scheduling.max_instances:
            return
        roles = [view.wanted_role for view in self._views.values()]
        role = Role.MIXED if Role.MIXED in roles else min((Role.PREFILL, Role.DECODE), key=roles.count)
        self._num_wanted = num_own + 1
        self._send(self._launcher_address, StartInstance(role))

    def _scale_in(self) -> None:
        num_available = sum(view.is_available for view in self._views.values())
        if not self._scheduling.min_instances or num_available <= self._scheduling.min_instances:
            return
        if self._launcher_address is not None and (view := self._fleet.to_retire()) is not None:
            self._drain(view)

    def _drain(self, view: InstanceView) -> None:
        view.is_draining = True
        self._fleet.refresh(view)
        self._send(view.peer.address, Drain())

    def _restart(self, view: InstanceView) -> None:
        view.is_stopping = True
        if self._launcher_address is not None:
            self._send(self._launcher_address, RestartInstance(view.name))

    def _stop(self, view: InstanceView) -> None:
        if self._launcher_address is not None:
            self._want_fewer(view.name)
            view.is_stopping = True
            self._send(self._launcher_address, StopInstance(view.name))

    def _want_fewer(self, name: str) -> None:
        """By this one, unless it is another node's: those come and go."""
        self._num_wanted -= node_name(name) is None
