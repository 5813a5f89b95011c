"""The instances of a node: started, started again, added and retired."""

import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Protocol

from flowkv.engine.process import InstanceSpec, run_instance
from flowkv.errors import ConfigError, FlowKVError
from flowkv.launch.children import Child, Children
from flowkv.messages import RESTART_MARK, InstanceExited, StartFailed
from flowkv.types import Role
from flowkv.wire import Outbox, tcp_address

_MAX_FAILED_STARTS = 3  # of one instance in a row, before the launcher gives up on it

_logger = logging.getLogger(__name__)


class Display(Protocol):
    """Where a launcher shows what its processes are doing."""

    def progress(self, process: str, fraction: float, text: str) -> None: ...

    def ready(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(slots=True)
class _Seat:
    """A place for one instance after another."""

    spec: InstanceSpec
    is_added: bool  # while the cluster runs, which goes on without it
    epoch: int = 0
    num_failed_starts: int = 0
    failure: str | None = None  # why the instance in it says that it cannot start
    is_retired: bool = False

    @property
    def is_first(self) -> bool:
        """No other instance was in this seat before."""
        return self.epoch == 0


class Instances:
    """By name. No name is used twice, and whatever ends is reported to the controller."""

    def __init__(
        self, children: Children, display: Display, outbox: Outbox, run_folder: Path, context: BaseContext
    ) -> None:
        """They are processes of `context` (of multiprocessing)."""
        self._children = children
        self._display = display
        self._outbox = outbox
        self._run_folder = run_folder
        self._context = context
        self._template: InstanceSpec | None = None
        self._host: str | None = None
        self._suffix = ""
        self._num_named: Counter[Role] = Counter()
        self._seats: dict[str, _Seat] = {}  # by the name of the instance in it

    @property
    def names(self) -> list[str]:
        return list(self._seats)

    # --- more and fewer --------------------------------------------------------------------------------------------

    def start(
        self, template: InstanceSpec, roles: list[Role], host: str | None, suffix: str = "", max_instances: int = 0
    ) -> None:
        """One for each role, like `template`, named by role and number. Memory and threads are shared out among
        `max_instances`, if those are more."""
        cores = len(os.sched_getaffinity(0))
        num_sharing = max(1, len(roles), max_instances)
        threads = template.config.engine.threads or max(1, (cores - 1) // num_sharing)  # one is left for all others
        self._template = replace(template, threads=threads, num_local_instances=num_sharing)
        self._host, self._suffix = host, suffix
        for role in roles:
            self._fill(_Seat(self._next_spec(self._template, role), is_added=False))

    def add(self, role: Role) -> None:
        if self._template is None:
            _logger.warning("no instance can be added before the first ones are started")
            return
        self._fill(_Seat(self._next_spec(self._template, role), is_added=True))

    def retire(self, name: str) -> None:
        """End it for good. Nothing is to be done where it has ended already: that was reported."""
        if (seat := self._seats.get(name)) is not None:
            seat.is_retired = True
            self._children.stop(name)

    def _next_spec(self, template: InstanceSpec, role: Role) -> InstanceSpec:
        number, self._num_named[role] = self._num_named[role], self._num_named[role] + 1
        return replace(template, name=f"{role}-{number}{self._suffix}", role=role)

    def _fill(self, seat: _Seat) -> None:
        """Start the seat's instance, under a name that no earlier one had."""
        name = seat.spec.name if seat.is_first else f"{seat.spec.name}{RESTART_MARK}{seat.epoch}"
        address = f"ipc://{self._run_folder}/{name}" if self._host is None else tcp_address(self._host, "*")
        spec = replace(seat.spec, name=name, address=address, pool_address=f"{self._run_folder}/{name}.pool")
        self._seats[name] = seat
        self._display.progress(name, 0.0, "starting")
        self._children.start(name, self._context, run_instance, spec)

    # --- what becomes of them --------------------------------------------------------------------------------------

    def on_ready(self, name: str) -> None:
        if (seat := self._seats.get(name)) is None:
            return
        seat.num_failed_starts = 0
        if seat.is_added and seat.is_first:
            self._display.note(f"added {name}")

    def on_start_failed(self, message: StartFailed) -> None:
        """Fatal while the node starts; what was to replace another, or was added, is counted when it has ended."""
        text = f"{message.process}: {message.reason}"
        seat = self._seats.get(message.process)
        if seat is None or (seat.is_first and not seat.is_added):
            raise ConfigError(text)
        seat.failure = message.reason
        if not seat.is_first:
            self._display.note(text)
        self._children.stop(message.process)

    def on_exit(self, child: Child, how: str) -> None:
        """FlowKVError if it was no instance, without which there is no cluster, or one that the node starts with."""
        name = child.name
        if (seat := self._seats.pop(name, None)) is None:
            raise FlowKVError(f"the {name} {how}")
        seat.num_failed_starts += not child.is_ready
        is_failed_start = seat.is_first and not child.is_ready and not seat.is_retired
        if is_failed_start and not seat.is_added:
            raise FlowKVError(f"{name} {how} before it was ready")
        reason = "retired" if seat.is_retired else seat.failure or how
        self._outbox.send(seat.spec.controller_address, InstanceExited(name, reason, seat.spec.epoch))
        if seat.is_retired:
            self._display.note(f"retired {name}")
        elif is_failed_start:  # whoever wanted it may ask again
            self._display.note(f"{name} could not be added: {reason}")
        elif seat.num_failed_starts >= _MAX_FAILED_STARTS:
            self._display.note(f"{name} {how}; it failed to start {seat.num_failed_starts} times and stays down")
        else:
            self._display.note(f"{name} {how}; starting it again")
            self._refill(seat)

    def _refill(self, seat: _Seat) -> None:
        seat.epoch += 1
        seat.failure = None
        self._fill(seat)
