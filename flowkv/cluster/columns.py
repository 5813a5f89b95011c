"""All instances side by side, a column a figure: what policies look at.

A row is written whenever something is heard of an instance or sent to it, so that a placement among a thousand is a
few operations on whole columns.
"""

from enum import IntEnum, auto

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]


class Field(IntEnum):
    """What a column holds of each instance. Seconds are predicted by the cost model that was learnt of it."""

    IS_AVAILABLE = 0
    IS_PREFILL = auto()  # role; neither this nor the next: mixed
    IS_DECODE = auto()
    POOL_TOKENS = auto()  # KV slots
    MAX_CHOICES = auto()
    ROOM_TOKENS = auto()  # KV slots left when all that was sent here has come and is half way through its output
    QUEUE_S = auto()  # until the prompts before a new one are computed
    DEFERRED_S = auto()  # and then until those that let all others pass are computed
    TOKEN_S = auto()  # a prompt token, beside the decodes that run
    PAIR_S = auto()  # and a pair of it and a position that it attends to
    DECODING = auto()  # choices
    STEP_S = auto()  # a step that only decodes, now
    FULL_STEP_S = auto()  # a step with a chunk beside these decodes
    PREFILL_FRACTION = auto()  # of the time lately, in steps with a chunk
    HOMES = auto()  # requests that decode here or will, wherever they are now
    HOME_TOKENS = auto()  # KV slots of these, half way through their outputs
    BASE_S = auto()  # a step that decodes: this, and the next two for each choice and KV slot
    CHOICE_S = auto()
    SLOT_S = auto()
    WRITE_S = auto()  # the KV of one token, to a peer


class Columns:
    """Instances come and go; `column` gives one figure of all."""

    def __init__(self) -> None:
        self._table: npt.NDArray[np.float64] = np.zeros((len(Field), 8))
        self.names: list[str] = []
        self._rows: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str) -> None:
        if len(self.names) == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._rows[name] = len(self.names)
        self.names.append(name)

    def remove(self, name: str) -> None:
        """The last row takes the place of this one."""
        row, last = self._rows.pop(name), self.names.pop()
        if last != name:
            self._table[:, row] = self._table[:, len(self.names)]
            self.names[row] = last
            self._rows[last] = row

    def write(self, name: str, values: tuple[float, ...]) -> None:
        """All fields of one instance, in their order."""
        self._table[:, self._rows[name]] = values

    def column(self, field: Field) -> Column:
        """[instances], a view."""
        return self._table[field, : len(self.names)]
