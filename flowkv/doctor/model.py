"""The model folder: whether it can be served, found out without loading the weights."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flowkv.config import ClusterConfig
from flowkv.doctor.finding import Finding, fail, ok, warn
from flowkv.errors import ModelError
from flowkv.launch.model import model_name, resolve_model
from flowkv.server.reasoning import thought_format
from flowkv.server.text.chat_template import Conversation
from flowkv.server.text.tokenizer import ModelTokenizer
from flowkv.server.tools import formats as tool_formats

_HELLO = Conversation([{"role": "user", "content": "hello"}])


def examine(config: ClusterConfig) -> tuple[list[Finding], int]:
    """Findings, and the bytes of the weights as far as they can be told."""
    try:
        folder = resolve_model(config)
    except ModelError as error:
        return [fail("model", str(error), "the path of a downloaded model")], 0
    if folder is None:
        return [ok("model", "none: --toy serves no model")], 0
    findings = [architecture(config, folder), weights(folder), *text(folder)]
    return findings, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def architecture(config: ClusterConfig, folder: Path) -> Finding:
    from flowkv.model import loading, support  # transformers: seconds, and only for a model

    try:
        found = loading.read_config(folder, loading.Trust(config.trust_remote_code, config.allow_pickled_weights))
        class_name = support.model_class(found, folder if config.trust_remote_code else None).__name__
        max_tokens, dtype = support.max_model_tokens(found), loading.resolve_dtype(found, config.dtype)
    except ModelError as error:
        return fail("model", str(error), "another model, or another version of this one")
    return ok("model", f"{model_name(config, folder)}: {class_name}, {dtype}, up to {max_tokens} tokens")


def weights(folder: Path) -> Finding:
    """Every file's header is read: what is missing or cut off shows there."""
    if missing := [name for name in _named(folder) if not (folder / name).is_file()]:
        text = f"{len(missing)} of the files in the index are missing, the first {missing[0]}"
        return fail("weights", text, "download the model again")
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            return fail("weights", f"{path.name} cannot be read: {error}", "download it again, or mend its rights")
    num_bytes = sum(path.stat().st_size for path in paths)
    return ok("weights", f"{len(paths)} safetensors files, {num_bytes / 2**20:,.0f} MiB")


def _named(folder: Path) -> list[str]:
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return []
    try:
        return sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        return [f"{path.name} (unreadable)"]


def text(folder: Path) -> Iterator[Finding]:
    """Tokenizer and chat template, as the frontend loads them."""
    try:
        tokenizer = ModelTokenizer(folder)
    except ModelError as error:
        yield fail("tokenizer", str(error), "the tokenizer's files of the same model")
        return
    if not tokenizer.eos_token_ids:
        yield warn("tokenizer", "no token ends a sequence", "eos_token_id in generation_config.json, or stop strings")
    else:
        yield ok("tokenizer", f"reads; {len(tokenizer.eos_token_ids)} tokens end a sequence")
    try:
        tokenizer.encode_chat(_HELLO)
    except Exception as error:  # a template is a program of the model's author
        yield warn("chat template", str(error), "serve /v1/completions alone, or add chat_template.jinja")
    else:
        yield ok("chat template", f"takes a conversation; {_formats(tokenizer)}")


def _formats(tokenizer: ModelTokenizer) -> str:
    """What "auto" of `server.tool_parser` and `server.reasoning_parser` finds."""
    calls = tool_formats.find_format(tokenizer.tool_template or "")
    thoughts = thought_format.find_format(tokenizer.chat_template or "")
    return f"tool calls: {calls or 'no known format'}; thoughts: {thoughts or 'none'}"
