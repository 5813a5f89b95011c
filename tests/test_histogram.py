from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Reference

from flowkv.histogram import Histogram, LabelledHistogram

BOUNDS = (0.25, 0.5, 1.0, 4.0)
values = st.lists(st.integers(0, 40).map(lambda n: n / 8))


def rendered(*collectors: Histogram | LabelledHistogram) -> str:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry).decode()


@given(values)
def test_it_counts_as_the_one_with_locks_does(observed: list[float]) -> None:
    registry = CollectorRegistry()
    reference = Reference("x_seconds", "What it is", buckets=BOUNDS, registry=registry)
    histogram = Histogram("x_seconds", "What it is", BOUNDS)
    for value in observed:
        reference.observe(value)
        histogram.observe(value)
    found = generate_latest(registry).decode().splitlines()
    assert rendered(histogram).splitlines() == [line for line in found if "_created" not in line]


def test_many_of_the_same() -> None:
    one, other = Histogram("x", "", BOUNDS), Histogram("x", "", BOUNDS)
    one.observe(0.5, 3)
    for _ in range(3):
        other.observe(0.5)
    assert rendered(one) == rendered(other)


def test_a_label_has_a_histogram_for_each_value() -> None:
    histogram = LabelledHistogram("x", "", "phase", BOUNDS)
    assert "x_bucket" not in rendered(histogram)
    histogram.observe("decode", 0.75)
    text = rendered(histogram)
    assert 'x_bucket{le="1.0",phase="decode"} 1.0' in text
    assert 'x_bucket{le="0.5",phase="decode"} 0.0' in text
    assert 'x_sum{phase="decode"} 0.75' in text
