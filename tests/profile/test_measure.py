"""`flowkv profile` over real processes of toys, which compute fast: what is measured is what was asked for."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from flowkv.config import ClusterConfig, load_config
from flowkv.cost import prefill_pairs
from flowkv.errors import ConfigError
from flowkv.launch.node import running_node
from flowkv.profile.cells import Cell, grid, shuffled
from flowkv.profile.fit import Measured
from flowkv.profile.links import measure_links
from flowkv.profile.measure import ProfileOptions, noise_fraction, profile
from flowkv.profile.rig import Rig
from flowkv.sim.costs import StepShape, cost_model

REPOSITORY = Path(__file__).parent.parent.parent
BLOCK_SIZE = 16
CHUNK = 64  # tokens in a step, at most


class Silent:
    """Shows nothing."""

    def progress(self, process: str, fraction: float, text: str) -> None:
        pass

    def ready(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def measured(cells: Sequence[Cell], concurrency: int = 1, step_s: float = 0.0) -> list[list[Measured]]:
    """The samples of each of so many toys that do the cells at the same time."""
    overrides = {"toy": True, "toy_step_s": step_s, "engine.max_batch_tokens": CHUNK, "engine.kv_memory": "8MiB"}
    config = load_config(None, overrides)
    done: list[None] = []
    with running_node(Silent(), None) as node:
        rig = Rig(node)
        rig.start(config, None, "toy", concurrency)
        with rig.counting():
            rig.run([cells] * concurrency, lambda: done.append(None))
        result = [subject.samples for subject in rig.subjects.values()]
    assert len(done) == concurrency * len(cells)
    return result


def test_prompts_are_measured_chunk_by_chunk() -> None:
    [samples] = measured([Cell(0, 0, 0, (CHUNK + 10,)), Cell(0, 0, 0, (CHUNK,))])
    assert [sample.shape for sample in samples] == [
        StepShape(CHUNK, prefill_pairs(0, CHUNK), 0, 0, 0),
        StepShape(10, prefill_pairs(CHUNK, 10), 0, 0, 1),
        StepShape(CHUNK, prefill_pairs(0, CHUNK), 0, 0, 1),
    ]
    assert all(sample.seconds > 0 for sample in samples)


def test_decodes_are_measured_together_on_each_of_two_instances() -> None:
    slow = 0.02  # or one has all its tokens before the next has come, on a busy machine
    for samples in measured([Cell(4, 20, 12)], concurrency=2, step_s=slow):
        num_tokens = sum(sample.shape.decode_choices for sample in samples)
        assert num_tokens == 4 * (12 - 1)  # the first token of each is its prompt's
        assert sum(sample.shape.prefill_tokens for sample in samples) == 4 * 20
        decodes = [sample for sample in samples if not sample.shape.prefill_tokens]
        largest = max(decodes, key=lambda sample: sample.num_steps)
        assert largest.shape.decode_choices == 4 * largest.num_steps
        assert sum(sample.shape.num_drawn for sample in samples) == 4 * 12


def test_prompts_are_measured_beside_decodes() -> None:
    [samples] = measured([Cell(3, 16, 0, (20, 24))])
    mixed = [sample.shape for sample in samples if sample.shape.decode_choices == 3 and sample.shape.prefill_tokens]
    assert [shape.prefill_tokens for shape in mixed][-2:] == [20, 24]
    assert [shape.num_drawn for shape in mixed][-2:] == [4, 4]


def test_links_have_speeds() -> None:
    with running_node(Silent(), None) as node:
        context = node.preload(load_config(None, {"toy": True}))
        node.stack.callback(node.children.stop_all)
        links = measure_links(node, context, 4096, repeats=2)
    assert 1e6 < links.link_bytes_per_s < 1e13
    assert 0 <= links.call_s < 0.1
    assert 0 < links.message_s < 0.1


def test_a_profile_is_a_cost_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [Cell(0, 0, 0, (30, 100)), Cell(2, 30, 6), Cell(4, 100, 6), Cell(2, 30, 0, (20,))]
    monkeypatch.setattr("flowkv.profile.measure.grid", lambda *arguments: few)
    out = tmp_path / "new" / "profile.json"
    profile(ProfileOptions(out, is_toy=True, is_quick=True, concurrency=2))
    model = cost_model(str(out), model="toy", dtype="toy")
    assert model.step_s(StepShape(100, prefill_pairs(0, 100), 0, 0, 1)) > 0
    written = json.loads(out.read_text())
    assert written["measured"]["concurrency"] == 2
    assert set(written["fitted"]["held_out_errors"]) == {"lines", "curves"}
    assert written["fitted"]["num_samples"] >= 2 * 2 * len(few)


def test_impossible_options_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--concurrency is at least 1"):
        profile(ProfileOptions(tmp_path / "profile.json", concurrency=0))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_profile_says_so_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    command = [sys.executable, "-m", "flowkv.cli", "profile", "--toy", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stderr is not None
        while "measuring" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        told = process.stderr.read()
    assert f"flowkv: error: profile: stopped before it was done; {out} is as it was\n" in told
    assert process.returncode == 1
    assert not out.exists()


# --- the grid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_quick", [False, True])
@pytest.mark.parametrize("max_tokens", [256, 2048, 131072])
def test_no_cell_asks_for_more_than_a_request_may_hold(max_tokens: int, is_quick: bool) -> None:
    engine = ClusterConfig().engine
    cells = grid(engine.max_batch_tokens, engine.max_choices, max_tokens, is_quick)
    assert any(cell.num_decodes and cell.prompts for cell in cells)
    assert any(cell.num_steps for cell in cells)
    for cell in cells:
        assert max((*cell.prompts, cell.context_tokens + cell.num_steps)) <= max_tokens


def test_each_round_has_every_cell_in_an_order_of_its_own() -> None:
    cells = grid(512, 256, 2048, is_quick=False)
    order = shuffled(cells, 3, seed=1)
    rounds = [order[i * len(cells) : (i + 1) * len(cells)] for i in range(3)]
    assert all(Counter(one) == Counter(cells) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert order == shuffled(cells, 3, seed=1) != shuffled(cells, 3, seed=2)


def test_noise_is_how_far_equal_steps_lie_apart() -> None:
    shapes = [StepShape(n, 0, 0, 0, 0) for n in (1, 2)]
    factors = (0.9, 0.98, 0.99, 1.0, 1.01, 1.02, 1.1)
    samples = [Measured(shape, seconds * f) for shape, seconds in zip(shapes, (1.0, 7.0), strict=True) for f in factors]
    assert noise_fraction(samples) == pytest.approx(0.02, abs=1e-9)
    assert noise_fraction([Measured(shapes[0], 1.0, 5)] * 5) == 0.0  # sums of several steps say nothing of one
