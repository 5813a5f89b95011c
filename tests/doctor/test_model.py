import json
import shutil
from pathlib import Path

import pytest

from flowkv import bundled
from flowkv.config import ClusterConfig, load_config
from flowkv.doctor.finding import Finding, Level
from flowkv.doctor.model import examine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled.MODEL_FOLDER, tmp_path / "model"))


def findings(folder: Path) -> dict[str, Finding]:
    found, _ = examine(load_config(None, {"model": str(folder)}, []))
    return {finding.check: finding for finding in found}


def edit(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_good_folder(folder: Path) -> None:
    found, weights_bytes = examine(load_config(None, {"model": str(folder)}, []))
    assert [finding.check for finding in found] == ["model", "weights", "tokenizer", "chat template"]
    assert {finding.level for finding in found} == {Level.OK}
    assert weights_bytes == (folder / "model.safetensors").stat().st_size


def test_a_toy_has_none() -> None:
    assert [finding.level for finding in examine(ClusterConfig(toy=True))[0]] == [Level.OK]


def test_no_folder(tmp_path: Path) -> None:
    [(found)] = findings(tmp_path / "nowhere").values()
    assert found.level is Level.FAIL and "no model folder" in found.text


def test_an_architecture_that_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="mamba")
    found = findings(folder)["model"]
    assert found.level is Level.FAIL and found.advice


def test_weights_that_were_cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    found = findings(folder)["weights"]
    assert found.level is Level.FAIL and "model.safetensors cannot be read" in found.text


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "model-1.safetensors"}}', "{"])
def test_weights_that_are_missing(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert findings(folder)["weights"].level is Level.FAIL


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    found = findings(folder)
    assert found["tokenizer"].level is Level.FAIL and "chat template" not in found


def test_no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    found = findings(folder)["chat template"]
    assert found.level is Level.WARN and "/v1/completions" in found.text


def test_a_chat_template_that_fails(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    assert findings(folder)["chat template"].level is Level.WARN


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content }}", "tool calls: no known format; thoughts: none"),
        ("{{ tools }}<tool_call>{{ '<think></think>' }}", "tool calls: hermes; thoughts: think"),
    ],
)
def test_a_chat_template_shows_how_its_model_calls_and_thinks(folder: Path, template: str, text: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    found = findings(folder)["chat template"]
    assert found.level is Level.OK and found.text == f"takes a conversation; {text}"
