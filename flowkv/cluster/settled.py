"""What was said of requests that are over: a `Submit` that comes again is answered alike, and runs nothing."""

from flowkv.messages import Accepted, Rejected

KEEP_S = 30.0  # at least, where not more than KEEP_MOST come in that time: repetitions follow within seconds
KEEP_MOST = 10_000

Answer = Accepted | Rejected


class Settled:
    """Two generations, of which the older is forgotten as a whole."""

    def __init__(self) -> None:
        self._young: dict[str, Answer] = {}
        self._old: dict[str, Answer] = {}
        self._since_s = 0.0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, request_id: str) -> Answer | None:
        return self._young.get(request_id) or self._old.get(request_id)

    def remember(self, answer: Answer) -> None:
        self._young[answer.request_id] = answer
        if len(self._young) >= KEEP_MOST:
            self._age()

    def pass_time(self, now_s: float) -> None:
        if now_s - self._since_s >= KEEP_S:
            self._since_s = now_s
            self._age()

    def _age(self) -> None:
        self._young, self._old = {}, self._young
