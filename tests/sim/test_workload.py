import gzip
import statistics
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report import ROOT
from flowkv.errors import WorkloadError
from flowkv.sim.workload import (
    LONGBENCH_PROMPTS,
    SHIFT_PHASES,
    TOKENS_PER_WORD,
    Lengths,
    LogNormal,
    Phase,
    TraceRequest,
    bursts,
    clipped,
    longbench,
    poisson,
    prompt_ids,
    read_trace,
    repeated,
    scaled,
    shift_test,
    shifting,
    synthetic,
    with_poisson_arrivals,
)

MOONCAKE = '{"timestamp": 500, "input_length": 600, "output_length": 7, "hash_ids": [3, 4]}\n'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n"
VOCAB = Lengths(100, 999)


def shared_prefix(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


# --- traces --------------------------------------------------------------------------------------------------------


def test_mooncake_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE + MOONCAKE.replace("500", "2000").replace("600", "512").replace("[3, 4]", "[3]"))
    assert read_trace(path) == [TraceRequest(0.0, 600, 7, (3, 4)), TraceRequest(1.5, 512, 7, (3,))]


def test_azure_rows(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE + "2023-11-16 18:17:04.2299600,110,27\r\n")
    first, second = read_trace(path)
    assert (first.arrival_s, first.num_prompt_tokens, first.num_output_tokens) == (0.0, 4808, 10)
    assert second.arrival_s == pytest.approx(0.25)


@pytest.mark.parametrize("text", [MOONCAKE, AZURE])
@pytest.mark.parametrize("name", ["trace.csv", "trace.jsonl", "trace.gz", "trace"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_format_is_told_by_the_content(
    tmp_path: Path, text: str, name: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(pack(text.encode()))
    (request,) = read_trace(path)
    assert request.arrival_s == 0.0
    assert request.num_output_tokens == (7 if text == MOONCAKE else 10)


def test_times_of_other_zones_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE.replace("9600,", "9600+02:00,") + "2023-11-16 16:17:04.9799600,1,1\n")
    assert [request.arrival_s for request in read_trace(path)] == [0.0, 1.0]


@pytest.mark.parametrize("name", ["mooncake.jsonl", "azure_code.csv"])
def test_excerpts_in_the_repository(name: str) -> None:
    requests = read_trace(ROOT / "benchmarks" / "data" / name)
    assert len(requests) == 300
    assert requests[-1].arrival_s > 60


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", MOONCAKE + "{broken\n", "t.jsonl:2: not a Mooncake request"),
        ("t.jsonl", MOONCAKE + "\n", "t.jsonl:2: not a Mooncake request"),
        ("t.jsonl", MOONCAKE.replace("600", "0"), r"t.jsonl:1: .*input_length"),
        ("t.jsonl", MOONCAKE.replace("[3, 4]", "[3]"), "t.jsonl:1: 600 prompt tokens take 2 hash_ids"),
        ("t.jsonl", MOONCAKE.replace("600", "-5"), r"t.jsonl:1: .*input_length"),
        ("t.jsonl", MOONCAKE.replace("7", "0"), r"t.jsonl:1: .*output_length"),
        ("t.jsonl", MOONCAKE.replace("500", "1e999"), "t.jsonl:1: not a Mooncake request"),
        ("t.jsonl", MOONCAKE + MOONCAKE.replace("500", "400"), "t.jsonl:2: arrives 0.1 s before the one above it"),
        ("t.jsonl", MOONCAKE + AZURE, "t.jsonl:2: not a Mooncake request"),
        ("t.jsonl", "", "no request in it"),
        ("t.csv", AZURE.splitlines()[0], "no request in it"),
        ("t.csv", "a,b\n", "t.csv:1: neither a Mooncake trace .* nor an Azure one"),
        ("t.csv", "\n", "t.csv:1: neither"),
        ("t.csv", AZURE + "2023-11-16 18:17:03.9,1,1\n", "t.csv:3: arrives 0.07996 s before the one above it"),
        ("t.csv", AZURE + "2023-11-16 18:17:04,12,-3\n", r"t.csv:3: .*GeneratedTokens"),
        ("t.csv", AZURE + "2023-11-16 18:17:04,12\n", "t.csv:3: not an Azure request"),
        ("t.csv", AZURE + "yesterday,12,3\n", "t.csv:3: not an Azure request"),
        ("t.csv", AZURE + "2023-11-16 18:17:04,12,many\n", "t.csv:3: not an Azure request"),
        ("t.csv", AZURE + "2023-11-16 18:17:04,12,0\n", r"t.csv:3: .*GeneratedTokens"),
    ],
)
def test_broken_traces_name_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(WorkloadError, match=message):
        read_trace(path)


def test_bytes_that_are_no_text_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for text in (MOONCAKE, AZURE):
        path.write_bytes(text.encode() + b"\xff\xfe\n")
        line = 3 if text == AZURE else 2
        with pytest.raises(WorkloadError, match=f"trace:{line}: not a"):
            read_trace(path)


def test_missing_and_half_gzipped_files(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(MOONCAKE.encode() * 100)[:60])
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(cut)


# --- changing and making workloads ---------------------------------------------------------------------------------


def test_lengths() -> None:
    assert Lengths.parse("7") == Lengths(7, 7)
    assert Lengths.parse("3:9") == Lengths(3, 9)
    for text in ("0", "9:3", "x", ""):
        with pytest.raises(ValueError):  # noqa: PT011  (argparse shows its own message)
            Lengths.parse(text)


def test_scaling_keeps_at_least_one_token_and_speeds_arrivals_up() -> None:
    (request,) = scaled([TraceRequest(10.0, 5, 1000)], scale_length=0.1, speedup=4)
    assert (request.arrival_s, request.num_prompt_tokens, request.num_output_tokens) == (2.5, 1, 100)


@given(st.lists(st.integers(0, 5), max_size=6), st.lists(st.integers(0, 5), max_size=6), st.floats(0.01, 1.0))
def test_scaled_prompts_share_what_the_hashes_share(left: list[int], right: list[int], scale: float) -> None:
    """Ids are made unique by position, as in the trace: a hash id stands for all of the prompt up to its block."""
    prefix = shared_prefix(left, right)
    chains = [
        [hash((side if i >= prefix else 0, i, value)) for i, value in enumerate(chain)]
        for side, chain in enumerate((left, right), 1)
    ]
    requests = scaled([TraceRequest(0.0, max(1, 512 * len(ids)), 1, tuple(ids)) for ids in chains], scale, 1.0)
    prompts = [prompt_ids(request, i, VOCAB, seed=0) for i, request in enumerate(requests)]
    assert [len(prompt) for prompt in prompts] == [request.num_prompt_tokens for request in requests]
    assert shared_prefix(*prompts) >= min(round(prefix * 512 * scale), *map(len, prompts))


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_different_hashes_are_different_blocks(scale: float) -> None:
    requests = scaled([TraceRequest(0.0, 1024, 1, (7, last)) for last in (8, 9)], scale, 1.0)
    prompts = [prompt_ids(request, 0, VOCAB, seed=0) for request in requests]
    assert shared_prefix(*prompts) == pytest.approx(512 * scale, abs=2)
    assert all(VOCAB.low <= token_id <= VOCAB.high for prompt in prompts for token_id in prompt)


def test_prompts_without_hashes_are_their_own_and_repeatable() -> None:
    request = TraceRequest(0.0, 50, 1)
    assert prompt_ids(request, 1, VOCAB, seed=0) == prompt_ids(request, 1, VOCAB, seed=0)
    assert prompt_ids(request, 1, VOCAB, seed=0) != prompt_ids(request, 2, VOCAB, seed=0)
    assert prompt_ids(request, 1, VOCAB, seed=0) != prompt_ids(request, 1, VOCAB, seed=1)


def test_poisson_arrivals_have_their_rate() -> None:
    requests = synthetic(4000, Lengths(1, 9), Lengths(2, 2), seed=5)
    assert {request.num_prompt_tokens for request in requests} == set(range(1, 10))
    timed = with_poisson_arrivals(requests, rate=20.0, seed=5)
    assert timed[0].arrival_s == 0.0
    assert timed[-1].arrival_s == pytest.approx(200.0, rel=0.1)
    assert {request.arrival_s for request in with_poisson_arrivals(requests, float("inf"), seed=5)} == {0.0}


def test_clipping_cuts_the_prompt_first() -> None:
    kept, num_clipped = clipped([TraceRequest(0, 90, 10), TraceRequest(0, 95, 10), TraceRequest(0, 5, 200)], 100)
    assert [(request.num_prompt_tokens, request.num_output_tokens) for request in kept] == [(90, 10), (90, 10), (1, 99)]
    assert num_clipped == 2


def test_repeating_goes_on_where_the_trace_ended() -> None:
    requests = [TraceRequest(0.0, 10, 1, (7,)), TraceRequest(3.0, 20, 2, (8,)), TraceRequest(4.0, 30, 3, (9,))]
    again = list(repeated(requests, 7, speedup=2.0))
    assert [request.arrival_s for request in again] == [0.0, 1.5, 2.0, 3.0, 4.5, 5.0, 6.0]
    assert [request.num_prompt_tokens for request in again] == [10, 20, 30, 10, 20, 30, 10]
    assert not any(request.hash_ids for request in again)  # a second pass is not the first one's text


def test_repeating_makes_requests_one_by_one() -> None:
    endless = repeated([TraceRequest(0.0, 10, 1), TraceRequest(1.0, 20, 2)], 10**12)
    assert [request.arrival_s for request in islice(endless, 3)] == [0.0, 1.0, 2.0]


# --- mixes ---------------------------------------------------------------------------------------------------------


def test_log_normal_lengths_have_their_mean_and_spread() -> None:
    requests = poisson(400.0, 50.0, LogNormal(800, 0.3), LogNormal(64), seed=3)
    lengths = [request.num_prompt_tokens for request in requests]
    assert statistics.mean(lengths) == pytest.approx(800, rel=0.01)
    assert statistics.stdev(lengths) == pytest.approx(800 * (2.718281828 ** (0.3**2) - 1) ** 0.5, rel=0.03)
    assert {request.num_output_tokens for request in requests} == {64}


@pytest.mark.parametrize(("burstiness", "variation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_gaps_have_their_rate_and_burstiness(burstiness: float, variation: float) -> None:
    requests = bursts(20.0, burstiness, 1000.0, LogNormal(1), LogNormal(1), seed=1)
    gaps = [after.arrival_s - before.arrival_s for before, after in pairwise(requests)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.05)


def test_phases_take_turns() -> None:
    phases = [Phase(10.0, LogNormal(900), LogNormal(9)), Phase(40.0, LogNormal(50), LogNormal(70))]
    requests = shifting(phases, phase_s=100.0, duration_s=350.0, seed=2)
    turns = [[r for r in requests if start <= r.arrival_s < start + 100] for start in (0, 100, 200, 300)]
    assert [{r.num_prompt_tokens for r in turn} for turn in turns] == [{900}, {50}, {900}, {50}]
    assert [len(turn) for turn in turns] == [pytest.approx(n, rel=0.15) for n in (1000, 4000, 1000, 2000)]
    assert max(r.arrival_s for r in requests) < 350


def test_the_shift_test_scales_both_of_its_rates() -> None:
    def rates(scale: float) -> list[float]:
        requests = shift_test(scale, seed=0)
        in_a = sum(request.arrival_s % 600 < 300 for request in requests)
        return [in_a / 900, (len(requests) - in_a) / 900]

    assert rates(1.0) == [pytest.approx(phase.rate, rel=0.03) for phase in SHIFT_PHASES]
    assert rates(0.5) == [pytest.approx(phase.rate / 2, rel=0.03) for phase in SHIFT_PHASES]


@pytest.mark.parametrize(("dataset", "words"), [("gov_report", 8734), ("multi_news", 2113), ("qmsum", 10614)])
def test_longbench_shapes(dataset: str, words: int) -> None:
    assert LONGBENCH_PROMPTS[dataset].mean == pytest.approx(words * TOKENS_PER_WORD)
    requests = longbench(dataset, rate=5.0, duration_s=2000.0, seed=0)
    mean = statistics.mean(request.num_prompt_tokens for request in requests)
    assert mean == pytest.approx(words * TOKENS_PER_WORD, rel=0.03)
    assert {request.num_output_tokens for request in requests} == {512}


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: poisson(9.0, 30.0, LogNormal(90, 0.5), LogNormal(9, 0.5), seed),
        lambda seed: bursts(9.0, 0.3, 30.0, LogNormal(90, 0.5), LogNormal(9, 0.5), seed),
        lambda seed: shift_test(0.05, seed),
        lambda seed: longbench("qmsum", 3.0, 30.0, seed),
    ],
)
def test_a_seed_gives_the_same_requests_and_another_seed_others(make: Callable[[int], list[TraceRequest]]) -> None:
    assert make(4) == make(4)
    assert make(4) != make(5)
    assert all(before.arrival_s <= after.arrival_s for before, after in pairwise(make(4)))
