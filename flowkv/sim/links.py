"""How long KV is on its way: a model of the links between instances."""

from dataclasses import dataclass

from flowkv.transfer.plan import Run


@dataclass(slots=True)
class _Port:
    """One direction of one instance's link: busy until then."""

    free_s: float = 0.0


class LinkModel:
    """Each instance has one port out and one in; a write holds both while it moves: calls, then bytes.

    Writes that share a port wait for each other in the order in which they were posted.
    """

    def __init__(self, bytes_per_s: float, call_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._call_s = call_s
        self._out: dict[str, _Port] = {}
        self._in: dict[str, _Port] = {}

    def write(self, source: str, target: str, runs: list[Run], block_bytes: int, now_s: float) -> tuple[float, float]:
        """(Begin, end) of a write that is posted now, s."""
        ports = (self._out.setdefault(source, _Port()), self._in.setdefault(target, _Port()))
        begin_s = max(now_s, *(port.free_s for port in ports))
        num_bytes = sum(run.num_blocks for run in runs) * block_bytes
        end_s = begin_s + len(runs) * self._call_s + num_bytes / self._bytes_per_s
        for port in ports:
            port.free_s = end_s
        return begin_s, end_s

    def forget(self, instance: str) -> None:
        self._out.pop(instance, None)
        self._in.pop(instance, None)
