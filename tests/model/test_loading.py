import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowkv.errors import ModelError
from flowkv.kv.layout import KvLayout
from flowkv.model.loading import load_model
from tests.model.tiny_models import CONFIGS, modules, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS["qwen3"], tmp_path_factory.mktemp("qwen3"))


def test_a_loaded_model_knows_its_shape(folder: Path) -> None:
    loaded = load_model(folder, "auto")
    assert loaded.layout(8) == KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=8, dtype="float32")
    assert (loaded.vocab_size, loaded.max_model_tokens) == (97, 256)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_used(folder: Path, dtype: str) -> None:
    assert load_model(folder, dtype).dtype == dtype
    model = modules(folder, dtype)
    assert model.dtype == getattr(torch, dtype) and not model.training


def test_auto_takes_the_dtype_of_the_config(tmp_path: Path) -> None:
    assert load_model(save_model(CONFIGS["llama"], tmp_path, torch.bfloat16), "auto").dtype == "bfloat16"


def test_progress_grows_to_one(folder: Path) -> None:
    seen: list[float] = []
    load_model(folder, "auto", on_progress=lambda fraction, text: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert len(seen) > 10


def test_two_models_of_one_folder_do_not_share_a_config(folder: Path) -> None:
    first, second = modules(folder), modules(folder)
    second.set_attn_implementation("eager")
    assert first.config._attn_implementation == "flowkv"


@pytest.mark.parametrize(("name", "complaint"), [
    ("", "There is no model folder"),
    ("config.json", "has no config.json"),
    ("model.safetensors", r"has no \*\.safetensors"),
])  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, name: str, complaint: str) -> None:
    folder = tmp_path / "model"
    if name:
        save_model(CONFIGS["llama"], folder)
        (folder / name).unlink()
    with pytest.raises(ModelError, match=complaint) as caught:
        load_model(folder, "auto")
    assert "\n" not in str(caught.value)


def test_a_damaged_config_is_one_line(tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama"], tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be used") as caught:
        load_model(folder, "auto")
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="nonesuch"):
        load_model(folder, "auto")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 are missing, the first model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_model(folder, "auto")


def test_truncated_weights_are_one_line(tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama"], tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, "auto")


def test_damaged_numbers_are_refused(tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="differ"):
        load_model(folder, "auto")


def test_unknown_dtypes_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="int8"):
        load_model(folder, "int8")
