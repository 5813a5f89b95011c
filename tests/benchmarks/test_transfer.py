"""The plans of the transfer benchmark, its figures and its picture; and one tiny run of both sides."""

from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from benchmarks import BenchmarkError
from benchmarks.transfer import handover, ladder, paced, peers, picture, pools, summary
from benchmarks.transfer.geometry import (
    LAST,
    LLAMA_8B,
    PROMPTS,
    RUNGS,
    Blocks,
    Order,
    Rung,
    block_ids,
    descriptor_indices,
    descriptors,
    plan_calls,
    runs_of,
)
from benchmarks.transfer.sides import run_pair
from flowkv.engine.batch import Batch, BatchItem
from flowkv.engine.sequence import Sequence
from flowkv.kv.layout import KvLayout
from flowkv.types import Request, SamplingParams

TINY = KvLayout(num_layers=2, num_kv_heads=1, head_dim=16, block_size=16, dtype="bfloat16")
POOL_BLOCKS = 12


def test_blocks_of_llama_are_two_mebibytes() -> None:
    assert LLAMA_8B.block_bytes == 2 * 2**20
    assert LLAMA_8B.block_bytes // (2 * LLAMA_8B.num_layers) == 32 * 2**10


@pytest.mark.parametrize("num_tokens", PROMPTS)
def test_calls_along_the_ladder_are_exact(num_tokens: int) -> None:
    options = ladder.Options()
    calls = [summary.num_calls(options, num_tokens, rung) for rung in RUNGS]
    blocks, planes = -(-num_tokens // 16), 64
    assert calls[0] == planes * blocks
    assert calls[2:5] == [planes * blocks, planes, blocks]
    assert calls[6:] == [blocks, 1]


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_every_rung_moves_the_same_bytes_to_their_place(rung: Rung) -> None:
    source, target = pools.source_pool(TINY, POOL_BLOCKS), pools.target_pool(TINY, POOL_BLOCKS)
    runs = runs_of(rung, 7, POOL_BLOCKS)
    plan = plan_calls(rung.order, runs, TINY, POOL_BLOCKS)
    assert plan.num_bytes.sum() == 7 * TINY.block_bytes
    pools.copy_calls(pools.address_of(target.buffer), pools.address_of(source.buffer), plan)
    pools.check(target, TINY, rung.order, runs, rung.name)
    moved = int(np.count_nonzero(np.frombuffer(target.buffer, np.uint64))) * 8
    assert moved == 7 * TINY.block_bytes


def test_a_piece_in_the_wrong_place_is_found() -> None:
    source, target = pools.source_pool(TINY, POOL_BLOCKS), pools.target_pool(TINY, POOL_BLOCKS)
    plan = plan_calls(Order.BLOCK_MAJOR, runs_of(LAST, 7, POOL_BLOCKS), TINY, POOL_BLOCKS)
    pools.copy_calls(pools.address_of(target.buffer), pools.address_of(source.buffer), plan)
    with pytest.raises(BenchmarkError, match="not those that were sent"):
        pools.check(target, TINY, Order.PER_LAYER, runs_of(LAST, 7, POOL_BLOCKS), "swapped")


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("blocks", Blocks)
def test_descriptors_name_what_calls_copy(order: Order, blocks: Blocks) -> None:
    ids = block_ids(5, POOL_BLOCKS, blocks, "source")
    rows = descriptors(order, TINY, POOL_BLOCKS)[descriptor_indices(order, ids, TINY, POOL_BLOCKS)]
    rung = Rung(order, blocks, RUNGS[0].calls)
    plan = plan_calls(order, runs_of(rung, 5, POOL_BLOCKS), TINY, POOL_BLOCKS)
    assert rows[:, 0].tolist() == plan.src.tolist()
    assert rows[:, 1].tolist() == plan.num_bytes.tolist()


def test_more_blocks_than_the_pool_has() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        block_ids(POOL_BLOCKS + 1, POOL_BLOCKS, Blocks.SEGMENTS, "source")


def ladder_samples(options: ladder.Options) -> list[ladder.Sample]:
    """Rung i takes (10 - i) s in both turns, a memcpy 2 s."""
    return [
        ladder.Sample(turn, num_tokens, "shm", i, 10.0 - i, 2.0, 2.5 if RUNGS[i] == LAST else None)
        for turn in range(2)
        for num_tokens in options.prompts
        for i in range(len(RUNGS))
    ]


def test_ladder_rows() -> None:
    options = ladder.Options(layout=TINY, prompts=(100,))
    first, *_, last = summary.ladder_rows(options, ladder_samples(options))
    assert (first["times_last"], last["times_last"]) == (pytest.approx(10 / 3), 1.0)
    assert (first["of_memcpy"], last["of_memcpy"]) == (pytest.approx(0.2), pytest.approx(2 / 3))
    assert (first["of_mapped_memcpy"], last["of_mapped_memcpy"]) == (None, pytest.approx(2.5 / 3))
    assert (first["num_calls"], last["num_calls"]) == (28, 1)
    assert last["bytes_per_s"] == pytest.approx(7 * TINY.block_bytes / 3)


def test_what_is_modelled_has_no_field_of_what_is_measured() -> None:
    options = ladder.Options(prompts=(500,))
    measured = summary.ladder_rows(options, ladder_samples(options))
    modelled = summary.modelled_rows(options)
    assert modelled[0]["modelled_call_seconds"] == pytest.approx(2048 * 34e-6)
    assert not {"modelled_call_seconds"} & set(measured[0])
    assert not {"seconds", "bytes_per_s"} & set(modelled[0])


def test_peers_are_compared_on_blocks_that_lie_alike_and_with_their_best() -> None:
    def samples(case: peers.Case, *seconds: float) -> list[peers.Sample]:
        return [peers.Sample(turn, 500, case, value) for turn, value in enumerate(seconds)]

    scattered = peers.Case("nixl", Blocks.FREE_LIST, Order.PER_LAYER, "READ")
    ratios = summary.peer_ratios(
        [
            *samples(peers.Case("flowkv", Blocks.SEGMENTS), 1.0, 2.0, 4.0),
            *samples(peers.Case("nixl", Blocks.SEGMENTS, operation="READ"), 3.0, 6.0, 12.0),
            *samples(peers.Case("nixl", Blocks.SEGMENTS), 2.0, 4.0, 8.0),
            *samples(scattered, 0.1, 0.1, 0.1),
            *samples(peers.Case("raw", Blocks.SEGMENTS, socket_bytes=4096), 0.5, 1.0, 2.0),
        ]
    )
    assert [(row["best"], row["times_its_rate"]) for row in ratios] == [
        ("NIXL WRITE, block-major", 2.0),
        ("1 raw socket, 4 KiB buffers", 0.5),
    ]


def test_handover_rows_take_a_step_and_the_exposed_time_away() -> None:
    options = handover.Options(decode_step_s=0.010)
    samples = [handover.Sample("shm", 500, "idle", 0.015 + 0.001 * i, 0.020, 0.002, 1, 64) for i in range(3)]
    (row,) = summary.handover_rows(options, samples)
    assert msgspec.to_builtins(row)["handover_s"]["p50"] == pytest.approx(0.006)
    assert msgspec.to_builtins(row)["beyond_exposed_s"]["p50"] == pytest.approx(0.004)
    assert row["exposed_fraction"] == pytest.approx(0.1)


def test_paced_steps_last_as_long_as_they_should() -> None:
    request = Request(request_id="wait-1", prompt_ids=[1] * 600, sampling=SamplingParams(max_tokens=9))
    prefill, decode = Sequence(request, "", 0), Sequence(request, "", 1, output_ids=[1, 1], num_computed=601)
    runner = paced.PacedRunner(20_000.0, 0.010)
    chunk, step = BatchItem(prefill, 0, 512), BatchItem(decode, 601, 1, (0,))
    assert runner.seconds(Batch(1, (chunk,))) == pytest.approx(0.0256)
    assert runner.seconds(Batch(2, (step,))) == pytest.approx(0.010)
    assert runner.seconds(Batch(3, (chunk, step))) == pytest.approx(0.0356)


def test_picture_shows_every_rung_and_nothing_modelled() -> None:
    options = ladder.Options(prompts=(500, 1_000))
    rows = msgspec.to_builtins(summary.ladder_rows(options, ladder_samples(options)))
    report = {"environment": {"cpu": "A & B"}, "ladder": {"rows": rows}}
    svg = picture.draw(report)
    texts = [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert sum(text.startswith(("per layer", "block-major")) for text in texts) == len(RUNGS)
    assert {"4,032 calls", "1 call"} <= set(texts)
    assert not any("odel" in text for text in texts)


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SystemExit, match="no ladder over shm"):
        picture.main(str(tmp_path / "report.json"), str(tmp_path / "ladder.svg"))
    assert not (tmp_path / "ladder.svg").exists()


def test_both_sides_run() -> None:
    options = ladder.Options(layout=TINY, prompts=(100,), backends=("shm",), rounds=1)
    fractions: list[float] = []
    found = run_pair("ladder", options, lambda fraction, _: fractions.append(fraction))
    samples = msgspec.convert(found, list[ladder.Sample])
    assert sorted(sample.rung for sample in samples) == list(range(len(RUNGS)))
    assert all(sample.seconds > 0 and sample.memcpy_s > 0 for sample in samples)
    assert fractions[-1] == 1.0


def test_a_side_that_fails_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="the source ended with code 1, the target with 1"):
        run_pair("carrier pigeons", ladder.Options(), lambda fraction, text: None)
