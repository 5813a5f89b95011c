"""How far two runs are apart, and that a real and a simulated run of the same requests are set side by side."""

import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from benchmarks import BenchmarkError, fidelity
from benchmarks.fidelity import Load, compare, comparison, loads, repeat_difference, request_error
from flowkv.sim.costs import PROFILE_FORMAT, Curve, Fit, LinkSpeeds, Profile
from flowkv.sim.figures import Record, RunResult
from flowkv.sim.workload import TraceRequest
from flowkv.types import Role

DATA = Path(__file__).parent.parent.parent / "benchmarks" / "data"
TTFTS_S = (0.1, 0.2, 0.4)


def run(factor: float = 1.0, extra_s: float = 0.0, error: str | None = None) -> RunResult:
    """Three requests of 5 tokens; TTFT and TPOT scaled by `factor`, and one TTFT longer by `extra_s`."""
    ttfts_s = [factor * seconds for seconds in TTFTS_S]
    ttfts_s[1] += extra_s
    records = [
        Record(i, 0.0, 100, 5, ttft_s=ttft_s, e2el_s=ttft_s + factor * 4 * 0.01, error=error)
        for i, ttft_s in enumerate(ttfts_s)
    ]
    return RunResult(records, [factor * 0.01] * 12, duration_s=factor)


def test_equal_runs_have_no_error() -> None:
    assert set(comparison(run(), [run(), run()]).values()) == {0.0}


def test_errors_are_relative_to_the_mean_of_the_real_runs_and_have_a_sign() -> None:
    errors = comparison(run(0.9), [run(0.9), run(1.1)])
    assert errors["ttft_s mean"] == pytest.approx(-0.1)
    assert errors["tpot_s p99"] == pytest.approx(-0.1)
    assert errors["output_tokens_per_s"] == pytest.approx(1 / 0.9 / ((1 / 0.9 + 1 / 1.1) / 2) - 1)
    assert errors["e2el_s median"] == pytest.approx(0.1)


def test_errors_of_requests_may_be_larger_than_those_of_their_mean() -> None:
    late = run()
    late.records.reverse()
    assert comparison(late, [run()])["ttft_s mean"] == pytest.approx(0)
    assert request_error("ttft_s", late, [run()]) == pytest.approx(0.75)  # of 3.0, 0.0 and 0.75


def test_requests_without_the_figure_in_every_run_are_left_out() -> None:
    short = run(2.0)
    short.records[0].num_output_tokens = 1
    assert request_error("tpot_s", run(), [run(), run()]) == 0.0
    assert request_error("tpot_s", short, [run(), run()]) == pytest.approx(1.0)


def test_repeats_are_as_far_apart_as_the_two_farthest() -> None:
    differences = repeat_difference([run(1.0), run(1.1), run(1.2)])
    assert differences["ttft_s mean"] == pytest.approx(1 - 1 / 1.2)
    assert repeat_difference([run()]) == {}


def test_a_run_with_a_failed_request_is_not_compared() -> None:
    with pytest.raises(BenchmarkError, match="3 requests failed: gone"):
        comparison(run(), [run(error="gone")])


def test_loads_take_turns_and_each_is_simulated_once() -> None:
    order: list[tuple[str, float]] = []

    def real(load: Load, number: int) -> RunResult:
        order.append((f"real {number}", load.rate))
        return run(1.0 + 0.1 * number)

    def simulated(load: Load) -> RunResult:
        order.append(("simulated", load.rate))
        return run()

    requests = [TraceRequest(0.0, 100, 5)] * 3
    rows = compare([Load("trace", rate, requests) for rate in (1.0, 2.0)], 2, real, simulated)
    assert order[:4] == [("real 0", 1.0), ("real 0", 2.0), ("real 1", 1.0), ("real 1", 2.0)]
    assert [name for name, _ in order[4:]] == ["simulated"] * 2
    assert rows[1]["rate"] == 2.0
    assert rows[1]["errors"]["ttft_s mean"] == pytest.approx(1 / 1.05 - 1)
    assert rows[1]["repeats"]["ttft_s mean"] == pytest.approx(1 - 1 / 1.1)
    assert json.loads(json.dumps(rows[0]["requests"]))["simulated"]["ttft_s"] == list(TTFTS_S)
    console = Console(record=True, width=200)
    fidelity.print_rows(console, rows)
    told = console.export_text()
    assert "-4.8% (9.1%)" in told
    assert "ttft_s mean 4.8%" in told


def arguments(*more: str) -> list[str]:
    return ["--profile", "profile.json", "--trace", str(DATA / "azure_code.csv"), "0.25", "--prefill", "1", *more]


def test_a_trace_comes_at_every_rate_and_fits_the_model() -> None:
    args = fidelity.parse_arguments(arguments("--rate", "2", "--rate", "8", "--num-requests", "200"))
    slow, fast = loads(args, max_total_tokens=1000)
    assert [load.rate for load in (slow, fast)] == [2.0, 8.0]
    assert slow.requests[-1].arrival_s == pytest.approx(100, rel=0.01)
    assert fast.requests[-1].arrival_s == pytest.approx(25, rel=0.01)
    assert max(r.num_prompt_tokens + r.num_output_tokens for r in slow.requests) == 1000


def test_a_trace_that_is_too_short_is_refused() -> None:
    args = fidelity.parse_arguments(arguments("--rate", "2", "--num-requests", "301"))
    with pytest.raises(BenchmarkError, match="has 300 requests, fewer than 301"):
        loads(args, 2048)


def test_the_simulated_cluster_is_that_of_the_server_on_the_machine_of_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    curve = Curve([0, 1], [0.0, 1e-4])
    profile = Profile(
        format=PROFILE_FORMAT, model="flowkv-tiny", dtype="float32", hardware="", max_model_tokens=2048,
        vocab_size=1536, token_bytes=2048, kv_bytes=2**26, noise_fraction=0.07,
        fit=Fit(step_s=1e-3, prefill=curve, pair_s=0, decode=curve, slot_s=0, row_s=0),
        links=LinkSpeeds(link_bytes_per_s=1e9, call_s=1e-5, message_s=1e-4),
    )  # fmt: skip
    path.write_bytes(msgspec.json.encode(profile))
    more = ("--rate", "2", "--num-requests", "20", "--decode", "2", "--set", "engine.max_batch_tokens=128")
    args = fidelity.parse_arguments([*arguments(*more), "--profile", str(path)])
    config = fidelity.simulated_config(args)
    assert config.roles == [Role.PREFILL, Role.DECODE, Role.DECODE]
    assert (config.simulate.noise_fraction, config.simulate.message_s) == (0.07, 1e-4)
    assert config.engine.max_batch_tokens == 128
    [load] = loads(args, 2048)
    simulated = fidelity.run_simulated(load, config, args)
    assert [record.error for record in simulated.records] == [None] * 20
