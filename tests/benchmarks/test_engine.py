"""The parts and floors of `benchmarks.engine` on a tiny model, and the model that engines are compared on."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from benchmarks import BenchmarkError, llama
from benchmarks.engine import __main__ as program
from benchmarks.engine import cells, clocks, instance, roofline, summary
from benchmarks.engine.cells import DECODE, PREFILL, WARMUP_STEPS, Bench, Cell, Plan
from benchmarks.engine.clocks import PARTS, Clocks
from benchmarks.engine.instance import Step
from benchmarks.engine.roofline import Machine, Model
from flowkv.config import EngineConfig
from flowkv.engine.batch import BatchResult
from flowkv.engine.engine import Engine
from flowkv.messages import LoadReport, Outputs
from flowkv.model.cpu_kernel import CpuKernel
from flowkv.model.loading import LoadedModel, load_model
from flowkv.server.text.tokenizer import ModelTokenizer
from tests.model.tiny_models import SHAPE, save_model

CHUNK = 32
CONFIG = EngineConfig(max_batch_tokens=CHUNK)
DECODES = Cell(DECODE, 3, 20)
CHUNKS = [Cell(PREFILL, CHUNK, start) for start in (0, 32, 64)]
NUM_STEPS, NUM_DECODED = 5, 16
MODEL = Model(num_body_parameters=1000, num_head_parameters=100, element_bytes=2, token_bytes=64, pair_flops=8)
MACHINE = Machine([1e6, 2e6], {1: [1e6], 2048: [3e6, 4e6]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(LlamaConfig(**{**SHAPE, "max_position_embeddings": 1200}), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, "float32")


@pytest.fixture
def bench(loaded: LoadedModel, tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield cells.open_bench(stack, tmp_path, loaded, CONFIG, [DECODES, *CHUNKS], NUM_DECODED)


def step(seconds: float, num_choices: int = 1, context: int = 0) -> Step:
    parts = dict.fromkeys(PARTS, seconds / len(PARTS))
    tokens = num_choices * context
    whole = {**parts, "step": seconds, "idle": 0.0}
    return Step(context - 1, num_choices, num_choices, num_choices, tokens, tokens, whole)


# --- cells on a real instance --------------------------------------------------------------------------------------


def test_a_decode_cell_has_all_choices_with_their_context_in_every_step(bench: Bench) -> None:
    steps = bench.decode(DECODES, NUM_STEPS, NUM_DECODED)
    first = DECODES.context + 1 + WARMUP_STEPS
    assert [s.context_tokens for s in steps] == [3 * (first + i) for i in range(NUM_STEPS)]
    assert {(s.num_items, s.num_tokens, s.num_draws) for s in steps} == {(3, 3, 3)}
    assert all(s.num_pairs == s.context_tokens for s in steps)


def test_cells_follow_each_other_in_one_pool(bench: Bench) -> None:
    for _ in range(3):
        assert len(bench.decode(DECODES, NUM_STEPS, NUM_DECODED)) == NUM_STEPS
        assert list(bench.prefill(CHUNKS)) == CHUNKS


def test_a_pool_for_one_prompt_holds_it(loaded: LoadedModel, tmp_path: Path) -> None:
    with ExitStack() as stack:
        assert cells.open_bench(stack, tmp_path, loaded, CONFIG, CHUNKS, NUM_DECODED).prefill(CHUNKS)


def test_a_prefill_cell_is_the_chunk_that_begins_there(bench: Bench) -> None:
    steps = bench.prefill(CHUNKS)
    assert [s.start for s in steps.values()] == [0, 32, 64]
    assert {s.num_tokens for s in steps.values()} == {CHUNK}
    assert [s.context_tokens for s in steps.values()] == [32, 64, 96]
    assert [s.num_draws for s in steps.values()] == [0, 0, 1]


def test_parts_are_the_whole_step(bench: Bench) -> None:
    for s in [*bench.decode(DECODES, NUM_STEPS, NUM_DECODED), *bench.prefill(CHUNKS).values()]:
        assert sum(s.seconds[part] for part in PARTS) == pytest.approx(s.seconds["step"])
        assert min(s.seconds[part] for part in PARTS if part != "sampling") > 0
        assert 0 <= s.seconds["idle"] <= s.seconds["step"]


def test_messages_go_to_the_others(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    take = instance.Others.take
    monkeypatch.setattr(instance.Others, "take", lambda others: heard.extend(take(others)))
    with ExitStack() as stack:
        one = cells.open_bench(stack, tmp_path, loaded, CONFIG, [DECODES, *CHUNKS], NUM_DECODED)
        one.decode(DECODES, NUM_STEPS, NUM_DECODED)
        one.prefill(CHUNKS)
        one.decode(DECODES, NUM_STEPS, NUM_DECODED)
    tokens = [len(output.token_ids) for message in heard if isinstance(message, Outputs) for output in message.outputs]
    assert sum(tokens) >= 3 * (WARMUP_STEPS + NUM_STEPS)  # those of the first cell have come by now
    assert any(isinstance(message, LoadReport) for message in heard)


def test_more_than_fits_is_an_error_and_does_not_wait_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "WAIT_S", 0.2)
    with pytest.raises(BenchmarkError, match="did not take"):
        bench.decode(Cell(DECODE, 3, 2000), NUM_STEPS, NUM_DECODED)


def test_choices_that_end_are_an_error(bench: Bench) -> None:
    with pytest.raises(BenchmarkError, match="nothing to compute"):
        bench.decode(DECODES, NUM_STEPS, 1 + WARMUP_STEPS)


def test_attention_that_no_clock_sees_is_an_error() -> None:
    unseen = step(1.0)
    unseen.seconds["attention"] = 0.0
    with pytest.raises(BenchmarkError, match="CpuKernel"):
        cells.check_attention([step(1.0), unseen])


# --- clocks --------------------------------------------------------------------------------------------------------


def test_clocks_are_gone_after_the_context() -> None:
    before = (CpuKernel.attend, Engine.next_batch)
    with clocks.timing():
        assert CpuKernel.attend is not before[0]
    assert before == (CpuKernel.attend, Engine.next_batch)


def test_clocks_add_up_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now_s))
    timers = Clocks()
    add = timers.timed("scheduling", lambda a, b: a + b)
    assert add(1, b=2) == 3
    assert add(3, 4) == 7
    timers.timed("messages", lambda: None)()
    assert timers.seconds == {"scheduling": 3.5, "messages": 0.25}


def test_attention_is_taken_out_of_the_forward_pass_and_the_rest_is_what_is_left() -> None:
    timers = Clocks()
    timers.seconds |= {"attention": 2.0, "scheduling": 0.5, "messages": 0.25}
    seconds = timers.split(BatchResult(1, [], forward_seconds=5.0, sampling_seconds=1.0), step_s=8.0, cpu_s=6.0)
    assert seconds == {
        "forward": 3.0, "attention": 2.0, "sampling": 1.0, "scheduling": 0.5, "messages": 0.25, "rest": 1.25,
        "step": 8.0, "idle": 2.0,
    }  # fmt: skip


# --- plans ---------------------------------------------------------------------------------------------------------


def test_cells_with_too_much_kv_or_beyond_the_model_are_left_out() -> None:
    plan = Plan(batches=(1, 8), contexts=(100, 1000), num_rounds=1, num_steps=10, max_cell_tokens=1000)
    wanted, skipped = plan.decode_cells(2000)
    assert wanted == [Cell(DECODE, 1, 100), Cell(DECODE, 1, 1000), Cell(DECODE, 8, 100)]
    assert skipped == [Cell(DECODE, 8, 1000)]
    assert Cell(DECODE, 1, 1000) in plan.decode_cells(1000)[1]


def test_chunks_begin_at_the_end_of_others() -> None:
    plan = Plan(batches=(1,), contexts=(128, 512, 2100, 8192), num_rounds=1, num_steps=10, max_cell_tokens=1)
    assert [cell.context for cell in plan.prefill_cells(512, 8704)] == [0, 512, 2048, 8192]
    assert [cell.context for cell in plan.prefill_cells(512, 8703)] == [0, 512, 2048]


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--context", "-1"], ["--rounds", "0"]])
def test_numbers_are_positive(wrong: list[str]) -> None:
    with pytest.raises(BenchmarkError, match="at least 1"):
        program.plan_of(program.parse_arguments(wrong))


# --- floors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [False, True])
def test_what_the_tiny_model_reads_and_multiplies(is_tied: bool, tmp_path: Path) -> None:
    folder = save_model(LlamaConfig(**SHAPE, tie_word_embeddings=is_tied), tmp_path)
    model = Model.of(folder, load_model(folder, "float32"))
    hidden, inner, layers, head_dim, kv_heads = 48, 64, 2, 12, 2
    attention = hidden * (hidden + 2 * kv_heads * head_dim) + hidden * hidden
    layer = attention + 3 * hidden * inner + 2 * hidden
    assert model.num_body_parameters == layers * layer + hidden
    assert model.num_head_parameters == 97 * hidden
    assert model.token_bytes == layers * 2 * kv_heads * head_dim * 4
    assert model.pair_flops == 4 * layers * hidden


def test_floors_of_a_decode_step() -> None:
    one = step(1.0, num_choices=4, context=10)
    assert MODEL.read_bytes(one) == 1100 * 2 + 40 * 64
    assert MODEL.flops(one) == 2 * (1000 + 100) * 4 + 8 * 40
    assert MODEL.read_bytes(one._replace(num_draws=0)) == 1000 * 2 + 40 * 64


def test_the_floor_is_the_longer_of_memory_and_arithmetic_at_the_best_rates() -> None:
    found = summary.figures(Cell(DECODE, 4, 10), [step(1.0, 4, 10), step(2.0, 4, 10), step(0.5, 4, 10)], MODEL, MACHINE)
    assert found["step_s"] == 1.0
    assert found["memory_floor_s"] == pytest.approx(4760 / 2e6)
    assert found["matrix_floor_s"] == pytest.approx(9120 / 4e6)
    assert found["floor_fraction"] == pytest.approx(4760 / 2e6)
    assert found["overhead_fraction"] == pytest.approx(2 / len(PARTS))


def test_slopes_are_multiples_of_what_reading_takes() -> None:
    def cell(context: int, seconds: float) -> dict[str, Any]:
        return summary.figures(Cell(DECODE, 2, context), [step(seconds, 2, context)], MODEL, MACHINE)

    read_s = 2 * MODEL.token_bytes / MACHINE.bandwidth  # a token of context, both choices
    linear = [cell(context, 0.01 + 3 * context * read_s) for context in (10, 20, 80)]
    (found,) = summary.slopes(linear, MACHINE)
    assert (found["times_read"], found["last_times_read"]) == (pytest.approx(3.0), pytest.approx(3.0))
    (bent,) = summary.slopes([*linear[:2], cell(80, 0.01 + (3 * 20 + 5 * 60) * read_s)], MACHINE)
    assert bent["last_times_read"] == pytest.approx(5.0)
    assert summary.slopes(linear[:1], MACHINE) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machine_is_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "READ_BYTES", 2**16)
    monkeypatch.setattr(roofline, "MATRIX_SIZE", 64)
    monkeypatch.setattr(roofline, "MATRIX_TURN_S", 1e-4)
    machine = Machine()
    machine.measure([1, 4], dtype)
    machine.measure([1, 4], dtype)
    assert len(machine.bandwidths) == 2
    assert {rows: len(rates) for rows, rates in machine.matrix_rates.items()} == {1: 2, 4: 2, roofline.LARGE_ROWS: 2}
    assert machine.bandwidth == max(machine.bandwidths)


# --- the program ---------------------------------------------------------------------------------------------------


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--dtype", "float32", "--batch", "2", "--context", "16", "64", "--steps", "2", "--rounds", "2"]
    return ["--model", str(folder), "--output", str(output), *sizes, *more]


@pytest.fixture
def fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(machine: Machine, rows: list[int], dtype: torch.dtype) -> None:
        machine.bandwidths.append(1e9)
        machine.matrix_rates.setdefault(rows[0], []).append(1e9)

    monkeypatch.setattr(Machine, "measure", measure)


@pytest.mark.usefixtures("fast_machine")
@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_a_run_writes_and_shows_every_cell(
    folder: Path, tmp_path: Path, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path, dtype: str, *, may_fuse: bool) -> LoadedModel:
        assert may_fuse is not bool(plain)
        return load_model(folder, dtype, may_fuse=may_fuse)

    monkeypatch.setattr(program, "load_model", load)
    console = Console(file=StringIO(), width=200)
    args = program.parse_arguments(arguments(folder, tmp_path / "engine.json", "--batch", "2", "9999", *plain))
    program.run(args, console)
    written = json.loads((tmp_path / "engine.json").read_text())
    measured = {(cell["phase"], cell["size"], cell["context"]): cell["num_steps"] for cell in written["cells"]}
    assert measured == {("decode", 2, 16): 4, ("decode", 2, 64): 4, ("prefill", 512, 0): 4}
    assert {cell["context"] for cell in written["skipped"]} == {16, 64}
    assert written["options"]["plain"] == bool(plain)
    file = console.file
    assert isinstance(file, StringIO)
    lines = file.getvalue().splitlines()
    assert any(line.split()[:3] == ["9999", "64", "-"] for line in lines)
    assert any("reading the KV takes" in line for line in lines)


@pytest.mark.usefixtures("fast_machine")
def test_a_run_that_breaks_leaves_the_rounds_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_round = cells.measure_round

    def broken(bench: Bench, plan: Plan, cells: list[Cell], seed: int, steps: Any, on_done: Any) -> None:
        if seed == 1:
            raise BenchmarkError("broken")
        measure_round(bench, plan, cells, seed, steps, on_done)

    monkeypatch.setattr(program, "measure_round", broken)
    with pytest.raises(BenchmarkError, match="broken"):
        program.run(program.parse_arguments(arguments(folder, tmp_path / "x.json")), Console(file=StringIO()))
    assert {cell["num_steps"] for cell in json.loads((tmp_path / "x.json").read_text())["cells"]} == {2}


def test_a_row_has_a_cell_for_every_column() -> None:
    cell = Cell(DECODE, 4, 10)
    measured = summary.row(summary.figures(cell, [step(1.0, 4, 10)], MODEL, MACHINE))
    assert len(measured) == len(summary.row(cell._asdict()))
    assert measured[-2:] == ["memory", "0%"]


# --- the model -----------------------------------------------------------------------------------------------------


def test_the_llama_has_its_parameters_and_a_word_for_every_id(tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    llama.make_llama(tmp_path)
    assert torch.equal(random_state, torch.get_rng_state())
    assert roofline.num_parameters(tmp_path) == llama.NUM_PARAMETERS
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    tokenizer = ModelTokenizer(tmp_path)
    words = [tokenizer.token_text(token_id) for token_id in range(llama.VOCAB_SIZE)]
    assert len(set(words)) == llama.VOCAB_SIZE
    assert tokenizer.encode("w3 w31999 hello") == [3, 31999, 0]
    assert tokenizer.eos_token_ids == {2}
