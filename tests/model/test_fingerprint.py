import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flowkv.errors import ModelError
from flowkv.model.fingerprint import weights_fingerprint

CONFIG = {"model_type": "llama", "hidden_size": 8}
TENSORS = {"a": np.arange(4096, dtype=np.float32), "b": np.ones((3, 5), np.float32)}


def folder(
    path: Path, files: list[dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]], **config: object
) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    for i, tensors in enumerate(files):
        save_file(tensors, path / f"model-{i}.safetensors", metadata={"format": "pt", "part": str(i)})
    return path


def test_copies_are_equal_however_they_are_cut_into_files(tmp_path: Path) -> None:
    whole = weights_fingerprint(folder(tmp_path / "whole", [TENSORS]))
    parts = [{"b": TENSORS["b"]}, {"a": TENSORS["a"]}]
    assert weights_fingerprint(folder(tmp_path / "parts", parts, transformers_version="5", _name_or_path="x")) == whole


def test_other_weights_shapes_names_and_configurations_differ(tmp_path: Path) -> None:
    others = [
        folder(tmp_path / "same", [TENSORS]),
        folder(tmp_path / "config", [TENSORS], hidden_size=9),
        folder(tmp_path / "weights", [TENSORS | {"a": TENSORS["a"] + 1}]),
        folder(tmp_path / "tail", [TENSORS | {"b": TENSORS["b"] * 2}]),
        folder(tmp_path / "shape", [TENSORS | {"b": TENSORS["b"].reshape(5, 3)}]),
        folder(tmp_path / "name", [{"a": TENSORS["a"], "c": TENSORS["b"]}]),
    ]
    assert len({weights_fingerprint(other) for other in others}) == len(others)


def test_what_cannot_be_read_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        weights_fingerprint(tmp_path)
    broken = folder(tmp_path / "broken", [TENSORS])
    (broken / "model-0.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]")
    with pytest.raises(ModelError, match="cannot be read"):
        weights_fingerprint(broken)
