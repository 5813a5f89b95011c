"""What a node has one of, and what is started again when it ends: controller, frontend, caretaker."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from flowkv.config import RestartConfig
from flowkv.errors import ConfigError, FlowKVError
from flowkv.launch.backoff import Backoff
from flowkv.launch.children import NotStarted
from flowkv.launch.display import Display
from flowkv.launch.timers import Timers
from flowkv.messages import RESTART_MARK, StartFailed

HANG_S = 10.0  # they beat every second
LOOK_S = 1.0  # how often a launcher looks, at least
_MAX_ELAPSED_S = 2.0  # what is longer between two looks was no silence: the launcher itself was stopped


@dataclass(slots=True)
class _Service:
    name: str  # of the first one
    start: Callable[[str, int], None]
    on_exit: Callable[[str], None]
    backoff: Backoff
    epoch: int = 0
    is_running: bool = False
    is_ready: bool = False
    is_retired: bool = False
    failure: str | None = None  # why it says that it cannot start
    is_watched: bool = False  # it is killed if it hangs
    silent_s: float | None = None  # since its last beat; None: before the first

    @property
    def present_name(self) -> str:
        return self.name if self.epoch == 0 else f"{self.name}{RESTART_MARK}{self.epoch}"


class Services:
    """By the name of the first one; those after it are `NAME~1`, `NAME~2`, ..."""

    def __init__(self, display: Display, timers: Timers) -> None:
        self._display = display
        self._timers = timers
        self._services: dict[str, _Service] = {}
        self._looked_s: float | None = None

    def start(
        self,
        name: str,
        config: RestartConfig,
        start: Callable[[str, int], None],
        on_exit: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`start(present name, number of those before it)` starts the process, now and when it has ended; `on_exit` is
        told the name of each that has, before the next one is started."""
        backoff = Backoff(config.max_failures, config.max_delay_s)
        service = self._services[name] = _Service(name, start, on_exit, backoff, is_watched=config.hung)
        self._run(service)

    def retire(self, name: str) -> None:
        """It is not started again."""
        self._services[name].is_retired = True

    def present_name(self, name: str) -> str:
        return self._services[name].present_name if name in self._services else name

    def is_running(self, name: str) -> bool:
        return name in self._services and self._services[name].is_running

    # --- what becomes of them --------------------------------------------------------------------------------------

    def on_ready(self, process: str, now_s: float) -> None:
        if (service := self._find(process)) is not None:
            service.is_ready = True
            service.backoff.ready(now_s)

    def on_beat(self, process: str) -> None:
        if (service := self._find(process)) is not None:
            service.silent_s = 0.0

    def take_hung(self, now_s: float) -> list[str]:
        """The processes that are ready and have said nothing for HANG_S, while this one was awake: to be killed."""
        elapsed_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, _MAX_ELAPSED_S)
        self._looked_s = now_s
        return [service.present_name for service in self._services.values() if self._hangs(service, elapsed_s)]

    def _hangs(self, service: _Service, elapsed_s: float) -> bool:
        if not (service.is_watched and service.is_running and service.is_ready) or service.silent_s is None:
            return False
        service.silent_s += elapsed_s
        if service.silent_s < HANG_S:
            return False
        service.silent_s, service.failure = 0.0, "said nothing for too long"
        return True

    def on_start_failed(self, message: StartFailed) -> bool:
        """Whether it is one of these. ConfigError if it was the first of its kind, and was never ready."""
        if (service := self._find(message.process)) is None:
            return False
        if service.epoch == 0 and not service.is_ready:
            raise ConfigError(f"{message.process}: {message.reason}")
        service.failure = message.reason
        return True

    def on_exit(self, process: str, is_ready: bool, how: str) -> None:
        """FlowKVError if it is not to be started again."""
        if (service := self._find(process)) is None:
            raise FlowKVError(f"the {process} {how}")
        service.is_running = False
        if service.is_retired:
            return
        reason, service.failure = service.failure or how, None
        if service.epoch == 0 and not is_ready:
            raise FlowKVError(f"the {process} {reason} before it was ready")
        delay_s = service.backoff.ended(time.monotonic())
        if delay_s is None:
            raise FlowKVError(f"the {process} {reason}: {service.backoff.describe_end()}")
        self._display.note(f"the {process} {reason}; {service.backoff.describe()}")
        service.on_exit(process)
        service.epoch += 1
        self._timers.at(time.monotonic() + delay_s, lambda: self._run(service))

    def _run(self, service: _Service) -> None:
        if service.is_retired:
            return
        service.is_running, service.is_ready, service.silent_s = True, False, None
        try:
            service.start(service.present_name, service.epoch)
        except NotStarted as error:
            if service.epoch == 0:
                raise FlowKVError(f"the {service.name} {error}") from error
            self.on_exit(service.present_name, False, str(error))

    def _find(self, process: str) -> _Service | None:
        found = (service for service in self._services.values() if service.present_name == process)
        return next((service for service in found if service.is_running), None)
