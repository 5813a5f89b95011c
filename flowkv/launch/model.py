"""Which model is served, and under what name."""

from pathlib import Path

from flowkv import bundled
from flowkv.config import ClusterConfig
from flowkv.errors import ModelError


def resolve_model(config: ClusterConfig) -> Path | None:
    """The folder to serve; None for a toy. ModelError if there is none."""
    if config.toy:
        return None
    if config.model is None:
        return bundled.MODEL_FOLDER
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {config.model}: give the path of a downloaded Hugging Face model "
            "(a folder with config.json, tokenizer.json and *.safetensors)"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    return folder.resolve()


def model_name(config: ClusterConfig, folder: Path | None) -> str:
    if config.model_name is not None:
        return config.model_name
    if folder is None:
        return "toy"
    return bundled.MODEL_NAME if config.model is None else folder.name
