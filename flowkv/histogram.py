"""Histograms that one thread counts in and the same thread reads: a tenth of the time of those with locks.

A frontend observes every token; that must not be what its time goes into.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Buckets:
    """Counts of values up to each bound, and beyond the last."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """`count` times the same."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def sum(self) -> float:
        return self._sum

    def cumulative(self) -> list[tuple[str, float]]:
        """(Bound, how many values are not above it), as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip([*self._bounds, float("inf")], self._counts, strict=True):
            total += count
            found.append((floatToGoString(bound), float(total)))  # type: ignore[no-untyped-call]
        return found


class Histogram(Collector):
    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._buckets = Buckets(bounds)
        self.observe = self._buckets.observe

    def collect(self) -> Iterable[Metric]:
        yield HistogramMetricFamily(self._name, self._text, self._buckets.cumulative(), self._buckets.sum)


class LabelledHistogram(Collector):
    """One label, whose values come as they are first observed."""

    def __init__(self, name: str, text: str, label: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._label = label
        self._bounds = bounds
        self._children: dict[str, Buckets] = {}

    def observe(self, label: str, value: float) -> None:
        child = self._children.get(label)
        if child is None:
            child = self._children[label] = Buckets(self._bounds)
        child.observe(value)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        for label, child in self._children.items():
            family.add_metric([str(label)], child.cumulative(), child.sum)
        yield family
