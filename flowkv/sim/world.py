"""The names of those who are not instances, and what an instance sees of everything around it."""

from collections.abc import Sequence
from typing import Protocol

from flowkv.engine.effects import Write
from flowkv.messages import Message, Outputs
from flowkv.sim.chrome import Recorder
from flowkv.sim.loop import Loop

CONTROLLER = "controller"
FRONTEND = "frontend"
LAUNCHER = "launcher"
BACKEND = "sim"  # of transfers


class World(Protocol):
    """What is around an instance."""

    loop: Loop
    recorder: Recorder | None

    def send(self, sender: str, address: str, message: Message) -> None: ...

    def write(self, source: str, write: Write) -> None: ...

    def put_out(self, outputs: Outputs, times_s: Sequence[float]) -> None:
        """Tokens for the frontend; of an output with several, the last is of the last time."""
