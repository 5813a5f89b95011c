"""A model folder in the Hugging Face format, loaded, checked and ready to be run over a KV pool."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from flowkv.errors import ModelError
from flowkv.kv.layout import KvLayout
from flowkv.model import fused, probe, support
from flowkv.model.attention import ATTENTION_NAME, Model, PlainModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS_FRACTION = 0.9  # of the progress; the rest is the check

OnProgress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Trust:
    """What a model's folder is allowed to do, beyond being data."""

    remote_code: bool = False
    pickled_weights: bool = False


NO_TRUST = Trust()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`num_layers`, `num_kv_heads` and `head_dim` are what the model was seen to keep, not what its config says."""

    model: Model
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_tokens: int

    def layout(self, block_size: int) -> KvLayout:
        return KvLayout(self.num_layers, self.num_kv_heads, self.head_dim, block_size, self.dtype)


def load_model(
    folder: Path,
    dtype: str,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
    *,
    may_fuse: bool = True,
    trust: Trust = NO_TRUST,
) -> LoadedModel:
    """Load from local files, safetensors unless more is trusted. `dtype` is `auto` (the config's) or one of `DTYPES`.

    Where `may_fuse`, a model of a family that `flowkv.model.fused` knows is run by that.
    `on_progress(fraction, text)` is called as it goes. ModelError if the folder has no usable model or FlowKV cannot
    serve its architecture.
    """
    report = on_progress or (lambda fraction, text: None)
    report(0.0, "reading the configuration")
    config = read_config(folder, trust)
    model_class = support.model_class(config, folder if trust.remote_code else None)
    max_tokens = support.max_model_tokens(config)
    dtype_name = resolve_dtype(config, dtype)
    model = load_weights(folder, model_class, config, dtype_name, report)
    torch.nn.Module.to(model, device)
    report(WEIGHTS_FRACTION, "checking the model")
    num_layers, geometry = probe.watch(model, max_tokens)
    expected = probe.expected_logits(model)
    vocab_size = int(model.config.get_text_config().vocab_size)
    ours = fused.FusedModel(model) if may_fuse and fused.fits(model) else PlainModel(model)
    probe.compare(ours, expected, num_layers, geometry, DTYPES[dtype_name], str(config.model_type))
    report(1.0, "model loaded")
    return LoadedModel(
        model=ours,
        dtype=dtype_name,
        num_layers=num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=vocab_size,
        max_model_tokens=max_tokens,
    )


def read_config(folder: Path, trust: Trust = NO_TRUST) -> PretrainedConfig:
    """ModelError, with what to do, if the folder is not a model that can be read."""
    if not folder.is_dir():
        raise ModelError(f"There is no model folder {folder}: give the path of a downloaded Hugging Face model.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: give the folder that holds a Hugging Face model's files.")
    if not has_safetensors(folder) and not (trust.pickled_weights and any(folder.glob("*.bin"))):
        raise ModelError(
            f"{folder} has no *.safetensors file: download the model's weights in that format (--allow-pickled-weights "
            "reads *.bin)."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust.remote_code)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        if not trust.remote_code and "trust_remote_code" in str(error):
            raise ModelError(
                f"The model in {folder} brings Python code of its own: read it, and give --trust-remote-code to run it."
            ) from error
        raise ModelError(f"The config.json in {folder} cannot be used: {first_line(error)}") from error
    # Another model made from the same object would change this one's attention.
    copied: PretrainedConfig = copy.deepcopy(config)
    return copied


def has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def resolve_dtype(config: PretrainedConfig, dtype: str) -> str:
    if dtype == "auto":
        stated = config.dtype or config.get_text_config().dtype
        dtype = str(stated).removeprefix("torch.") if stated is not None else "float32"
    if dtype not in DTYPES:
        raise ModelError(f"The dtype {dtype} is not served: choose one of {', '.join(DTYPES)}.")
    return dtype


def load_weights(
    folder: Path, model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: str, report: OnProgress
) -> PreTrainedModel:
    with weights_progress(report):
        try:
            loaded: Any = model_class.from_pretrained(
                folder,
                config=config,
                dtype=DTYPES[dtype],
                attn_implementation=ATTENTION_NAME,
                local_files_only=True,
                use_safetensors=has_safetensors(folder),
                output_loading_info=True,
            )
        except (ValueError, RuntimeError, OSError, ImportError, SafetensorError, UnpicklingError) as error:
            raise ModelError(f"The weights in {folder} cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(f"The weights in {folder} are incomplete: {len(missing)} are missing, the first {missing[0]}.")
    model.train(False)
    return model


@contextmanager
def weights_progress(report: OnProgress) -> Iterator[None]:
    """Turns the progress bars of transformers into calls of `report` while the weights load."""

    def make_bar(factory: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if keywords.get("desc") == "Loading weights" and args:
            return ReportedIteration(args[0], report)
        return factory(*args, **{**keywords, "disable": True})

    previous = transformers_logging.set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class ReportedIteration:
    """Iterates over a sized collection and reports how much of it is done."""

    def __init__(self, elements: Any, report: OnProgress) -> None:
        self._elements = elements
        self._report = report

    def __iter__(self) -> Iterator[Any]:
        for index, element in enumerate(self._elements):
            self._report(WEIGHTS_FRACTION * index / len(self._elements), "loading weights")
            yield element
