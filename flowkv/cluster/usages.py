"""What the processes of a cluster take of their machines, as they last said. Pure."""

import msgspec

from flowkv.messages import RESTART_MARK, Usage
from flowkv.types import ProcessUsage

_MOST_DIGITS = 10
SILENT_S = 10.0  # who has said nothing for so long is gone, and its line with it


class Usages:
    """By the place that a process has; who takes it after a restart says so by its name."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, ProcessUsage]] = {}

    def hear(self, message: Usage, now_s: float) -> None:
        place, _, generation = message.process.partition(RESTART_MARK)
        num_restarts = int(generation) if generation.isdecimal() and len(generation) < _MOST_DIGITS else 0
        self._heard[place] = (now_s, msgspec.structs.replace(message.usage, num_restarts=num_restarts))

    def table(self, now_s: float) -> dict[str, ProcessUsage]:
        self._heard = {place: heard for place, heard in self._heard.items() if now_s - heard[0] < SILENT_S}
        return {place: usage for place, (_, usage) in self._heard.items()}
