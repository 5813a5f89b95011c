"""What a controller that was started again finds out before it decides anything: who holds what, and who waits for it.

Instances run on meanwhile and frontends keep their streams. Each instance registers once more, with the requests that
it answers for; each frontend claims those that it waits for. A claim that comes before all instances are back is
kept, since the request may run somewhere.
"""

from collections.abc import Iterable

from flowkv.messages import LoadReport, Register, Submit

_SETTLE_S = 5.0  # an instance that is silent for so long is stalled: what it held goes on elsewhere
_JOINED_SETTLE_S = 3.0  # for instances of other nodes, of which nobody here knows how many there are
_CLAIM_S = 10.0  # a frontend that lives has claimed what is its own long before


class Rebuild:
    """`expected`: the instances of this node that were running; `has_nodes`: there may be others elsewhere."""

    def __init__(self, expected: Iterable[str], *, has_nodes: bool) -> None:
        self._expected = set(expected)
        self._least_s = _JOINED_SETTLE_S if has_nodes else 0.0
        self._passed_s = 0.0
        self._holders: dict[str, str] = {}  # request id -> instance
        self._kept: dict[str, Submit] = {}
        self.is_settled = False

    @property
    def is_over(self) -> bool:
        """Nothing that was there before can turn up any more."""
        return self.is_settled and self._passed_s >= _CLAIM_S

    def keep(self, message: Submit) -> None:
        """Until everyone is back. A repetition may know more of itself."""
        self._kept[message.request.request_id] = message

    def drop(self, request_id: str) -> None:
        """Its client has gone."""
        self._kept.pop(request_id, None)

    def registered(self, message: Register) -> None:
        """One that a peer is about to take over is that peer's if both say that they hold it."""
        name = message.peer.instance
        self._expected.discard(name)
        for request_id in message.sending:
            self._holders.setdefault(request_id, name)
        for request_id in message.running:
            self._holders[request_id] = name

    def hear(self, message: LoadReport) -> None:
        for request_id, owner in message.handed_over:
            if request_id in self._holders:
                self._holders[request_id] = owner
        for request_id in [*message.returned, *(request_id for request_id, _ in message.finished)]:
            self._holders.pop(request_id, None)

    def gone(self, instance: str) -> None:
        self._expected.discard(instance)
        self._holders = {request_id: name for request_id, name in self._holders.items() if name != instance}

    def frontend_gone(self, frontend: str) -> None:
        """What it has kept nobody waits for any more."""
        self._kept = {request_id: message for request_id, message in self._kept.items() if message.frontend != frontend}

    def pass_time(self, elapsed_s: float) -> list[Submit]:
        """What was kept, once everyone is back or too much time has passed."""
        self._passed_s += elapsed_s
        is_back = not self._expected and self._passed_s >= self._least_s
        self.is_settled = self.is_settled or is_back or self._passed_s >= _SETTLE_S
        if not self.is_settled:
            return []
        kept, self._kept = list(self._kept.values()), {}
        return kept

    def claim(self, request_id: str) -> str | None:
        """Who holds it; nobody asks again."""
        return self._holders.pop(request_id, None)

    def unclaimed(self) -> list[tuple[str, str]]:
        """(Request id, instance) of what nobody waits for."""
        return list(self._holders.items())
