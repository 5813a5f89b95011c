"""A short name for the weights in a model folder, so that two nodes do not serve two models under one name."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowkv.errors import ModelError

_NUM_SAMPLES = 4  # of each tensor, evenly spread
_SAMPLE_BYTES = 32
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")  # of config.json: differ between copies
_HEADER_LENGTH_BYTES = 8  # a safetensors file: length (little endian), header (JSON), tensors


def weights_fingerprint(folder: Path) -> str:
    """Equal for copies of one model, however its tensors are shared out between files; any other almost surely differs.

    Reads `config.json`, the headers of `*.safetensors` and a few bytes of each tensor, and of each pickled file, which
    is not opened otherwise. ModelError if it cannot.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
        tensors = sorted(line for path in folder.glob("*.safetensors") for line in _describe(path))
        tensors += sorted(map(_describe_pickled, folder.glob("*.bin"))) if not tensors else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"The model in {folder} cannot be read: {error}") from error
    lines = [json.dumps(kept, sort_keys=True), *tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _describe(path: Path) -> Iterator[str]:
    """Name, dtype, shape and samples of each tensor in a file."""
    with path.open("rb") as file:
        num_header_bytes = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        header: dict[str, Any] = json.loads(file.read(num_header_bytes))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, stop = (_HEADER_LENGTH_BYTES + num_header_bytes + offset for offset in tensor["data_offsets"])
            samples = b"".join(
                os.pread(file.fileno(), min(_SAMPLE_BYTES, stop - at), at) for at in _positions(start, stop)
            )
            yield f"{name} {tensor['dtype']} {tensor['shape']} {samples.hex()}"


def _describe_pickled(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        samples = b"".join(os.pread(file.fileno(), _SAMPLE_BYTES, at) for at in _positions(0, size))
    return f"{path.name} {size} {samples.hex()}"


def _positions(start: int, stop: int) -> range:
    return range(start, stop, max(1, math.ceil((stop - start) / _NUM_SAMPLES)))
