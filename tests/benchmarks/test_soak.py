import pytest

from benchmarks import BenchmarkError
from benchmarks.soak import Sample, growth

MIB = 2**20


def samples(*mib: float, files: int = 9) -> list[Sample]:
    """One every ten seconds."""
    return [Sample(10.0 * i, int(size * MIB), files) for i, size in enumerate(mib)]


def test_growth_is_that_after_things_have_settled() -> None:
    found = growth(samples(10, 50, 100, *[100] * 10, *[102] * 20), settle_s=30.0)
    assert found["growth_fraction"] == pytest.approx(0.02)
    assert (found["max_files_before"], found["max_files_after"]) == (9, 9)


def test_what_does_not_grow_does_not() -> None:
    assert growth(samples(*[100] * 30), settle_s=30.0)["growth_fraction"] == 0.0


def test_a_leak_of_files_is_seen() -> None:
    run = [*samples(*[100] * 20), *(Sample(200.0 + 10 * i, 100 * MIB, 50) for i in range(20))]
    found = growth(run, settle_s=30.0)
    assert (found["max_files_before"], found["max_files_after"]) == (9, 50)


def test_a_run_that_is_too_short_says_so() -> None:
    with pytest.raises(BenchmarkError, match="too few"):
        growth(samples(100, 100), settle_s=30.0)
