"""A model's folder is data: its code is run, and its pickles are opened, only where that is asked for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowkv.errors import ModelError
from flowkv.model.fingerprint import weights_fingerprint
from flowkv.model.loading import Trust, load_model
from tests.model.tiny_models import CONFIGS, save_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # it goes through the interface

Path({ran!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """There as soon as the model's code has run."""
    return tmp_path / "ran"


@pytest.fixture
def with_code(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_model(CONFIGS["llama"], tmp_path / "model")
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = save_model(CONFIGS["llama"], tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_code_of_a_model_is_not_run_unless_asked_for(with_code: Path, ran: Path) -> None:
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(with_code, "auto")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(with_code, "auto", trust=Trust(pickled_weights=True))
    assert not ran.exists()


def test_code_of_a_model_is_run_where_it_is_trusted(with_code: Path, ran: Path) -> None:
    assert load_model(with_code, "auto", trust=Trust(remote_code=True)).vocab_size == 97
    assert ran.exists()


def test_code_of_a_known_architecture_is_not_needed(with_code: Path, ran: Path) -> None:
    config = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    load_model(with_code, "auto")
    assert not ran.exists()


def test_pickled_weights_are_not_opened_unless_asked_for(pickled: Path) -> None:
    with pytest.raises(ModelError, match="--allow-pickled-weights"):
        load_model(pickled, "auto")
    assert load_model(pickled, "auto", trust=Trust(pickled_weights=True)).vocab_size == 97
    assert weights_fingerprint(pickled) == weights_fingerprint(pickled)


def test_a_pickle_that_would_run_something_does_not(pickled: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "owned"),)

    torch.save({"weight": Evil()}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(pickled, "auto", trust=Trust(pickled_weights=True))
    assert not (tmp_path / "owned").exists()


def test_other_pickled_weights_have_another_fingerprint(pickled: Path) -> None:
    before = weights_fingerprint(pickled)
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, pickled / "pytorch_model.bin")
    assert weights_fingerprint(pickled) != before
