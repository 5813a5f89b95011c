"""What a request has been through: its attempts, and whether another is worth it."""

from dataclasses import dataclass

from flowkv.errors import RequestError
from flowkv.types import attempt_id

# Of attempts that ended with the death of their instance, since the request itself may be what kills it:
MAX_FRUITLESS = 8  # in a row that brought no token
MAX_DEATHS, TOKENS_A_DEATH = 16, 16  # and in all: so many, and one more for so many tokens
PATIENCE_S = 60.0  # for an instance to take it, after one was lost
_SILENCE_S = 10.0  # after which the controller is asked whether it still runs
_GAP_S = 3.0  # messages of two instances may come in any order, but not that far apart


@dataclass(slots=True)
class Recovery:
    request_id: str  # of the first attempt
    num_attempts: int = 0  # after the first
    resumes: str | None = None  # the attempt that was lost last
    _num_tokens: int = 0  # that were out when it was
    _num_fruitless: int = 0
    _num_deaths: int = 0
    _waits_since_s: float | None = None
    _gap_since_s: float | None = None
    _heard_s: float = 0.0

    def heard(self, now_s: float) -> None:
        """Something has come of it."""
        self._heard_s = now_s
        self._waits_since_s = None

    def waits(self, now_s: float) -> None:
        """It was accepted once, and nobody is known to run it."""
        self._waits_since_s = now_s

    def is_silent(self, now_s: float) -> bool:
        return now_s - self._heard_s >= _SILENCE_S

    def lose(self, num_tokens: int, now_s: float, *, died: bool) -> str:
        """An attempt is lost, with so many tokens out; the id of the next. `died`: with its instance.

        RequestError (500) after too many such deaths.
        """
        if died:
            self._count_death(num_tokens)
        self.resumes = attempt_id(self.request_id, self.num_attempts)
        self.num_attempts += 1
        self._num_tokens, self._gap_since_s = num_tokens, None
        self.waits(now_s)
        return attempt_id(self.request_id, self.num_attempts)

    def _count_death(self, num_tokens: int) -> None:
        self._num_deaths += 1
        self._num_fruitless = 1 if num_tokens > self._num_tokens else self._num_fruitless + 1
        if self._num_fruitless > MAX_FRUITLESS or self._num_deaths > MAX_DEATHS + num_tokens // TOKENS_A_DEATH:
            reason = f"{self._num_deaths} instances failed while they held this request"
            raise RequestError(reason, status=500, code="instance_failed")

    def check_patience(self, now_s: float) -> None:
        """While nobody is known to run it. RequestError (503) after too long."""
        if self._waits_since_s is not None and now_s - self._waits_since_s >= PATIENCE_S:
            reason = f"the instance that held this request failed, and no other took it within {PATIENCE_S:.0f} s"
            raise RequestError(reason, status=503, code="unavailable")

    def is_broken(self, has_gap: bool, now_s: float) -> bool:
        """Whether something of this attempt was lost on its way, going by how long tokens are missing before others."""
        if not has_gap:
            self._gap_since_s = None
        elif self._gap_since_s is None:
            self._gap_since_s = now_s
        return self._gap_since_s is not None and now_s - self._gap_since_s >= _GAP_S
