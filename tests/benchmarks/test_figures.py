import pytest

from benchmarks.figures import Record, Slo, figures


def record(*event_s: float, tokens: int | None = None, error: str | None = None) -> Record:
    num_tokens = len(event_s) if tokens is None else tokens
    return Record(sent_s=1.0, event_s=list(event_s), num_prompt_tokens=10, num_output_tokens=num_tokens, error=error)


def test_one_request() -> None:
    one = record(1.5, 1.6, 1.9)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.itl_s == pytest.approx([0.1, 0.3])
    assert one.tpot_s == pytest.approx(0.2)


def test_tpot_counts_tokens_not_events() -> None:
    assert record(1.5, 2.3, tokens=5).tpot_s == pytest.approx(0.2)
    assert record(1.5).tpot_s is None
    assert record().ttft_s is None


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), True),
        (Slo(ttft_s=0.5), True),
        (Slo(ttft_s=0.4), False),
        (Slo(tpot_s=0.25), True),
        (Slo(tpot_s=0.1), False),
        (Slo(ttft_s=0.5, tpot_s=0.1), False),
    ],
)
def test_slo(slo: Slo, good: bool) -> None:
    assert slo.holds(record(1.5, 1.6, 1.9)) is good


def test_what_failed_or_said_nothing_is_never_good() -> None:
    assert not Slo().holds(record(1.5, error="gone"))
    assert not Slo().holds(record())


def test_figures_of_a_run() -> None:
    run = figures([record(1.5, 1.6, 1.9), record(2.0, 2.1), record(1.1, error="gone")], 2.0, Slo(ttft_s=0.6))
    assert (run["num_requests"], run["num_errors"]) == (3, 1)
    assert run["output_tokens_per_s"] == 2.5
    assert run["requests_per_s"] == 1.0
    assert run["goodput_per_s"] == 0.5
    assert run["good_fraction"] == pytest.approx(1 / 3)
    assert run["ttft_s"]["p50"] == pytest.approx(0.75)
    assert run["itl_s"]["max"] == pytest.approx(0.3)
    assert run["tokens_per_event"] == 1.0


def test_a_run_in_which_all_failed() -> None:
    run = figures([record(error="gone")], 2.0, Slo())
    assert run["ttft_s"] is None
    assert run["goodput_per_s"] == 0.0
