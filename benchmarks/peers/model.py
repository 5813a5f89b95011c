"""The one model that everybody serves, made once."""

import shutil
from pathlib import Path

DTYPE = "bfloat16"


def ensure_model(folder: Path) -> Path:
    """A Llama of 58.5 M random parameters with its tokenizer; made whole or not at all."""
    if not folder.exists():
        from benchmarks.llama import make_llama  # loads torch

        unfinished = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_llama(unfinished)
        unfinished.rename(folder)
    return folder
