"""The instances of a node: started, started again, added and retired."""

import logging
import os
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path

from flowkv.engine.process import InstanceSpec, run_instance
from flowkv.errors import ConfigError, FlowKVError
from flowkv.launch.backoff import Backoff
from flowkv.launch.children import Child, Children, NotStarted
from flowkv.launch.display import Display
from flowkv.launch.timers import Timers
from flowkv.messages import RESTART_MARK, InstanceExited, StartFailed
from flowkv.types import Role
from flowkv.wire import Outbox, tcp_address

_MAX_EXITS = 100  # ends that are told again to a controller that has been started again

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seat:
    """A place for one instance after another."""

    spec: InstanceSpec
    is_added: bool  # while the cluster runs, which goes on without it
    backoff: Backoff
    epoch: int = 0
    failure: str | None = None  # why the instance in it says that it cannot start
    is_retired: bool = False

    @property
    def is_first(self) -> bool:
        """No other instance was in this seat before."""
        return self.epoch == 0

    @property
    def must_start(self) -> bool:
        """The node does not come up without it."""
        return self.is_first and not self.is_added


class Instances:
    """By name. No name is used twice, and whatever ends is reported to the controller.

    While one waits until it is started again the others serve.
    """

    def __init__(
        self,
        children: Children,
        display: Display,
        outbox: Outbox,
        timers: Timers,
        run_folder: Path,
        context: BaseContext,
    ) -> None:
        """They are processes of `context` (of multiprocessing)."""
        self._children = children
        self._display = display
        self._outbox = outbox
        self._timers = timers
        self._run_folder = run_folder
        self._context = context
        self._template: InstanceSpec | None = None
        self._host: str | None = None
        self._suffix = ""
        self._num_named: Counter[Role] = Counter()
        self._seats: dict[str, _Seat] = {}  # by the name of the instance in it
        self._is_closing = False
        self._exits: deque[InstanceExited] = deque(maxlen=_MAX_EXITS)

    @property
    def names(self) -> list[str]:
        return list(self._seats)

    @property
    def ready_names(self) -> list[str]:
        children = (self._children.get(name) for name in self._seats)
        return [child.name for child in children if child is not None and child.is_ready]

    @property
    def ready_addresses(self) -> list[str]:
        """Mailboxes of those; none where they are on the network, at ports that nobody chose."""
        return [] if self._host is not None else [self._address(name) for name in self.ready_names]

    def tell_exits(self) -> None:
        """Once more, of those that have ended lately: to a controller that cannot have heard it."""
        if self._template is not None:
            for exited in self._exits:
                self._outbox.send(self._template.controller_address, exited)

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
            self._fill(self._new_seat(self._template, role, is_added=False))

    def add(self, role: Role) -> None:
        if self._template is None:
            _logger.warning("no instance can be added before the first ones are started")
            return
        self._fill(self._new_seat(self._template, role, is_added=True))

    def retire(self, name: str) -> None:
        """End it for good. Nothing is to be done where it has ended already: that was reported."""
        if (seat := self._seats.get(name)) is not None:
            seat.is_retired = True
            self._children.stop(name)

    def restart(self, name: str, hangs: bool) -> None:
        """End it, by force where it hangs, and start another. Nothing is to be done where it has ended already."""
        if (seat := self._seats.get(name)) is None:
            return
        if hangs:
            seat.failure = "said nothing for too long"
            self._children.kill(name)
        else:
            seat.failure = "was drained"
            seat.backoff.worked()
            self._children.stop(name)

    def close(self) -> None:
        """None is started any more, and what has not come into service yet is ended."""
        self._is_closing = True
        for name in set(self.names) - set(self.ready_names):
            self.retire(name)

    def _new_seat(self, template: InstanceSpec, role: Role, is_added: bool) -> _Seat:
        number, self._num_named[role] = self._num_named[role], self._num_named[role] + 1
        spec = replace(template, name=f"{role}-{number}{self._suffix}", role=role)
        restart = template.config.restart
        return _Seat(spec, is_added, Backoff(restart.max_failures, restart.max_delay_s))

    def _fill(self, seat: _Seat) -> None:
        """Start the seat's instance, under a name that no earlier one had. FlowKVError if it cannot and must."""
        name = seat.spec.name if seat.is_first else f"{seat.spec.name}{RESTART_MARK}{seat.epoch}"
        pool_address = f"{self._run_folder}/{name}.pool"
        spec = replace(seat.spec, name=name, address=self._address(name), pool_address=pool_address)
        self._seats[name] = seat
        self._display.progress(name, 0.0, "starting")
        try:
            self._children.start(name, self._context, run_instance, spec)
        except NotStarted as error:
            if seat.must_start:
                raise FlowKVError(f"{name} {error}") from error
            self._end(self._seats.pop(name), name, str(error), is_failed_start=seat.is_first)

    def _address(self, name: str) -> str:
        """To bind to."""
        return f"ipc://{self._run_folder}/{name}" if self._host is None else tcp_address(self._host, "*")

    # --- what becomes of them --------------------------------------------------------------------------------------

    def on_ready(self, name: str) -> None:
        if (seat := self._seats.get(name)) is None:
            return
        seat.backoff.ready(time.monotonic())
        if seat.is_added and seat.is_first:
            self._display.note(f"added {name}")

    def on_working(self, name: str) -> None:
        if (seat := self._seats.get(name)) is not None:
            seat.backoff.worked()

    def on_start_failed(self, message: StartFailed) -> None:
        """Fatal while the node starts; what was to replace another, or was added, is counted when it has ended."""
        text = f"{message.process}: {message.reason}"
        if (seat := self._seats.get(message.process)) is None:
            _logger.warning("%s (it is gone)", text)
            return
        child = self._children.get(message.process)
        if seat.must_start and not (child is not None and child.is_ready):
            raise ConfigError(text)
        seat.failure = message.reason
        self._children.stop(message.process)

    def on_exit(self, child: Child, how: str) -> None:
        """FlowKVError if it was one that the node starts with."""
        name = child.name
        seat = self._seats.pop(name)
        is_failed_start = seat.is_first and not child.is_ready and not seat.is_retired
        if is_failed_start and seat.must_start:
            raise FlowKVError(f"{name} {how} before it was ready")
        self._end(seat, name, how, is_failed_start)

    def _end(self, seat: _Seat, name: str, how: str, is_failed_start: bool) -> None:
        """Whoever has to know is told, and the seat is filled again unless nobody wants that."""
        reason = "retired" if seat.is_retired else seat.failure or how
        exited = InstanceExited(name, reason, seat.spec.epoch, is_final=seat.is_retired or self._is_closing)
        self._exits.append(exited)
        self._outbox.send(seat.spec.controller_address, exited)
        if seat.is_retired:
            self._display.note(f"retired {name}")
        elif is_failed_start:  # whoever wanted it may ask again
            self._display.note(f"{name} could not be added: {reason}")
        elif not self._is_closing:
            self._start_again(seat, name, reason)

    def _start_again(self, seat: _Seat, name: str, how: str) -> None:
        now_s = time.monotonic()
        delay_s = seat.backoff.ended(now_s)
        if delay_s is None:
            self._display.note(f"{name} {how}; it stays down: {seat.backoff.describe_end()}")
            return
        self._display.note(f"{name} {how}; {seat.backoff.describe()}")
        seat.epoch += 1
        seat.failure = None
        self._timers.at(now_s + delay_s, lambda: self._refill(seat))

    def _refill(self, seat: _Seat) -> None:
        if not self._is_closing:
            self._fill(seat)
