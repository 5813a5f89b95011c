import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import BenchmarkError
from benchmarks.report import ROOT
from benchmarks.workload import (
    Lengths,
    TraceRequest,
    clipped,
    prompt_ids,
    read_trace,
    scaled,
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


def test_gzipped_traces_and_any_order_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress((MOONCAKE.replace("500", "900") + MOONCAKE).encode()))
    assert [request.arrival_s for request in read_trace(path)] == [0.0, pytest.approx(0.4)]


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
        ("t.jsonl", "", "no request in it"),
        ("t.csv", "a,b\n", "t.csv:1: the columns are not TIMESTAMP"),
        ("t.csv", AZURE + "2023-11-16 18:17:04,12\n", "t.csv:3: not an Azure request"),
        ("t.csv", AZURE + "yesterday,12,3\n", "t.csv:3: not an Azure request"),
        ("t.csv", AZURE + "2023-11-16 18:17:04,12,many\n", "t.csv:3: not an Azure request"),
        ("t.csv", AZURE + "2023-11-16 18:17:04,12,0\n", r"t.csv:3: .*GeneratedTokens"),
        ("t.txt", "", "a trace is a .jsonl"),
    ],
)
def test_broken_traces_name_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        read_trace(path)


def test_missing_and_half_gzipped_files(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(MOONCAKE.encode() * 100)[:60])
    with pytest.raises(BenchmarkError, match="cannot be read"):
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
