"""The fused forward pass against the modules that it stands for."""

from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

from flowkv.model import fused
from flowkv.model.attention import Model, PlainModel
from flowkv.model.fused import FusedModel
from flowkv.model.loading import load_model
from flowkv.model.packing import pack
from tests.effort import examples
from tests.model.tiny_models import CONFIGS, VOCAB_SIZE, modules, save_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK_SIZE = 4
BLOCKS_A_SEQUENCE = 16
TOLERANCE = 1e-4  # of the size of a position's logits, in float32
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_model(CONFIGS[name], tmp_path_factory.mktemp(name), torch.bfloat16) for name in FAMILIES}


@cache
def both(folder: Path, dtype: str) -> tuple[Model, Model]:
    assert fused.fits(modules(folder, dtype))
    return PlainModel(modules(folder, dtype)), FusedModel(modules(folder, dtype))


@torch.inference_mode()
def logits(model: Model, name: str, dtype: str, chunks: Sequence[Sequence[int]], seed: int) -> list[torch.Tensor]:
    """Of every step's rows, which the seed picks: step i takes the i-th chunk of every sequence that has one."""
    generator = torch.Generator().manual_seed(seed)
    config = CONFIGS[name]
    order = torch.randperm(len(chunks) * BLOCKS_A_SEQUENCE, generator=generator).tolist()
    tables = [order[i * BLOCKS_A_SEQUENCE : (i + 1) * BLOCKS_A_SEQUENCE] for i in range(len(chunks))]
    ids = torch.randint(VOCAB_SIZE, (len(chunks), BLOCKS_A_SEQUENCE * BLOCK_SIZE), generator=generator)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    forward = model.over(torch.zeros((len(order), 2, 2, BLOCK_SIZE, 2, head_dim), dtype=getattr(torch, dtype)))
    starts, found = [0] * len(chunks), []
    for counts in zip_longest(*chunks, fillvalue=0):
        present = [i for i, count in enumerate(counts) if count]
        spans = [(starts[i], counts[i]) for i in present]
        batch = pack([start for start, _ in spans], [n for _, n in spans], [tables[i] for i in present], BLOCK_SIZE)
        tokens = torch.cat([ids[i, start : start + n] for i, (start, n) in zip(present, spans, strict=True)])
        rows = torch.randperm(len(tokens), generator=generator)[: 1 + seed % len(tokens)].sort().values
        found.append(forward(batch, tokens, rows).float())
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return found


@given(
    name=st.sampled_from(FAMILIES),
    dtype=st.sampled_from(DTYPES),
    chunks=st.lists(st.lists(st.sampled_from([1, 1, 2, 7, 16]), min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=examples(80), deadline=None)
def test_it_gives_the_logits_of_the_modules(
    folders: dict[str, Path], name: str, dtype: str, chunks: list[list[int]], seed: int
) -> None:
    """In bfloat16, where two ways of rounding are compared, it is no farther from float32 than the modules are."""
    right = torch.cat(logits(both(folders[name], "float32")[0], name, "float32", chunks, seed))
    plain, ours = (torch.cat(logits(model, name, dtype, chunks, seed)) for model in both(folders[name], dtype))
    assert ours.shape == right.shape
    if dtype == "float32":
        assert ((ours - right).norm(dim=-1) <= TOLERANCE * right.norm(dim=-1)).all()  # which is 0 after a pad token
    else:
        assert (ours - right).norm() < 1.5 * (plain - right).norm() + 0.02 * right.norm()


def test_positions_beyond_the_first_table_of_angles(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = both(folders["llama"], "float32")
    monkeypatch.setattr(fused, "FIRST_POSITIONS", 3)
    ours = FusedModel(modules(folders["llama"]))
    chunks = [[2, 1, 16, 16, 16]]
    found = logits(ours, "llama", "float32", chunks, 0)
    for one, right in zip(found, logits(plain, "llama", "float32", chunks, 0), strict=True):
        assert torch.allclose(one, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_who_is_fused(tmp_path: Path, name: str) -> None:
    folder = save_model(CONFIGS[name], tmp_path)
    assert isinstance(load_model(folder, "float32").model, FusedModel if name in FAMILIES else PlainModel)
    assert isinstance(load_model(folder, "float16").model, PlainModel)
    assert isinstance(load_model(folder, "float32", may_fuse=False).model, PlainModel)


def changed(name: str, **fields: object) -> PretrainedConfig:
    config = CONFIGS[name].__class__(**{**CONFIGS[name].to_dict(), **fields})
    assert isinstance(config, PretrainedConfig)
    return config


@pytest.mark.parametrize(
    "config",
    [
        changed("llama", hidden_act="gelu"),
        changed("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
        changed("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ],
)
def test_what_the_loops_do_not_compute_keeps_its_modules(tmp_path: Path, config: PretrainedConfig) -> None:
    assert not fused.fits(modules(save_model(config, tmp_path)))


@pytest.mark.parametrize(
    "config",
    [
        changed("llama", attention_bias=True, mlp_bias=True),
        changed("llama", tie_word_embeddings=True),
        changed("llama", rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }),
        changed("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ],
    ids=["biases", "tied", "llama3", "layers of two kinds"],
)  # fmt: skip
def test_variants(tmp_path: Path, config: PretrainedConfig) -> None:
    """Loading compares the logits with those of the model's own attention."""
    assert isinstance(load_model(save_model(config, tmp_path), "float32").model, FusedModel)
