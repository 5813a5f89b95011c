"""`numba.njit` with a cache on disk in which no stale code survives.

Numba compiles again when the file of a function changes, but not when one that it imports does, and a stale kernel
computes wrong numbers. So the cache lies in a folder that is named by what all kernels are made of: beside them, or in
the user's cache where that cannot be written to.
"""

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numba.core.config
from numba.misc import appdirs

_HERE = Path(__file__).parent
_config: Any = numba.core.config


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator; `options` are those of `numba.njit`."""

    def wrap(function: Callable[..., Any]) -> Any:
        before = _config.CACHE_DIR  # read when a function is decorated
        _config.CACHE_DIR = str(_cache_folder(before))
        try:
            return numba.njit(cache=True, **options)(function)
        finally:
            _config.CACHE_DIR = before

    return wrap


@cache
def _cache_folder(wanted: str) -> Path:
    """In the folder that NUMBA_CACHE_DIR names, if it does."""
    sources = sorted([*_HERE.glob("*kernels.py"), Path(__file__)])
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    if wanted:
        parent = Path(wanted)
    elif os.access(_HERE, os.W_OK):
        parent = _HERE / "__pycache__"
    else:
        parent = Path(appdirs.user_cache_dir("numba"))  # type: ignore[no-untyped-call]
    return parent / f"kernels-{digest}"
