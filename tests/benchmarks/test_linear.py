import pytest

from benchmarks import linear
from flowkv.model import bf16_kernels


@pytest.mark.skipif(not bf16_kernels.is_supported(), reason="needs AVX512-BF16")
def test_both_are_measured_on_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ROWS", (1, 3))
    found = linear.measure(8, 40, rounds=2, spread_bytes=2000)
    assert [one["rows"] for one in found] == [1, 3]
    assert all(one["seconds"].keys() == linear.KINDS.keys() and min(one["seconds"].values()) > 0 for one in found)


def test_rates_are_of_the_weights_and_of_the_products() -> None:
    one = {"inputs": 10, "outputs": 100, "rows": 3, "seconds": {"ours": 1e-6, "oneDNN": 2e-6}}
    assert linear.table_row(one) == ("10 x 100", "3", "1", "2", "2.0", "1.0", "6", "3", "2.00")
