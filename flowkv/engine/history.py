"""What a receiver remembers of reservations that are over, so that a late or doubled message can be answered again."""

from enum import Enum, auto


class Fate(Enum):
    UNKNOWN = auto()  # never heard of
    ENDED = auto()  # refused, or its writer has said that it is done
    ADOPTED = auto()  # its request is, or was, this instance's
    SETTLED = auto()  # the source has closed it and waits for no answer


class History:
    """Of one source. It shrinks by what the source says of its oldest open attempt, so it holds what may be asked."""

    def __init__(self) -> None:
        self._oldest = 0
        self._fates: dict[int, Fate] = {}

    def __len__(self) -> int:
        return len(self._fates)

    def fate(self, attempt: int) -> Fate:
        return Fate.SETTLED if attempt < self._oldest else self._fates.get(attempt, Fate.UNKNOWN)

    def end(self, attempt: int, fate: Fate) -> None:
        """The first word counts."""
        if attempt >= self._oldest:
            self._fates.setdefault(attempt, fate)

    def settle_below(self, oldest: int) -> None:
        if oldest > self._oldest:
            self._oldest = oldest
            self._fates = {attempt: fate for attempt, fate in self._fates.items() if attempt >= oldest}
