"""Two contestants, the same loads, taking turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType

from benchmarks import BenchmarkError
from benchmarks.decode import Load
from benchmarks.peers.drive import Figures
from benchmarks.peers.process import IDLE_CORE_FRACTION, settled_core_fraction

Play = Callable[[Load, int], Figures]  # a load and a seed for its prompts

_WARM_UP_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Contestant:
    """An engine to measure: `open()` starts it and gives what plays a round; `settings` go into the report."""

    name: str
    settings: Mapping[str, object]
    open: Callable[[], AbstractContextManager[Play]]


@dataclass(frozen=True, slots=True)
class Turn:
    round: int
    load: int
    side: int  # 0 or 1


@dataclass(frozen=True, slots=True)
class Sample:
    """What one contestant made of one load in one round; `place` is 0 where it went first."""

    contestant: str
    load: Load
    round: int
    place: int
    figures: Figures


def order(rounds: int, num_loads: int, together: bool) -> Iterator[Turn]:
    """A B, B A, A B...: load by load where both are up together, else all loads of a round at one visit."""
    for number in range(rounds):
        sides = (0, 1) if number % 2 == 0 else (1, 0)
        if together:
            yield from (Turn(number, load, side) for load in range(num_loads) for side in sides)
        else:
            yield from (Turn(number, load, side) for side in sides for load in range(num_loads))


class Stage:
    """Keeps both contestants up `together`, or never more than one; plays a warm-up of every load after each start.

    Together, a turn begins when both have come to rest; BenchmarkError where they do not.
    """

    def __init__(self, contestants: Sequence[Contestant], loads: Sequence[Load], together: bool) -> None:
        self.idle_core_fraction: dict[str, float] = {}  # after the last start; of all that were up by then
        self._contestants = contestants
        self._loads = loads
        self._together = together
        self._up: dict[str, Play] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Stage":
        try:
            for contestant in self._contestants if self._together else ():
                self._start(contestant)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def play(self, turn: Turn) -> Figures:
        contestant = self._contestants[turn.side]
        if contestant.name not in self._up:
            self._up.clear()
            self._stack.close()
            self._start(contestant)
        if self._together:
            self._await_rest()
        return self._up[contestant.name](self._loads[turn.load], 1 + turn.round * len(self._loads) + turn.load)

    def _start(self, contestant: Contestant) -> None:
        play = self._stack.enter_context(contestant.open())
        for number, load in enumerate(self._loads):
            play(load, _WARM_UP_SEED + number)
        self.idle_core_fraction[contestant.name] = settled_core_fraction()
        self._up[contestant.name] = play

    def _await_rest(self) -> None:
        if (fraction := settled_core_fraction()) > IDLE_CORE_FRACTION:
            raise BenchmarkError(f"idle servers use {fraction:.0%} of a core: measure them with --no-together")


def samples(
    stage: Stage, contestants: Sequence[Contestant], loads: Sequence[Load], turns: Iterator[Turn]
) -> Iterator[Sample]:
    """Plays the turns, in their order."""
    for turn in turns:
        place = int((turn.side == 1) == (turn.round % 2 == 0))
        yield Sample(contestants[turn.side].name, loads[turn.load], turn.round, place, stage.play(turn))
