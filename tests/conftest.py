"""Settings of every test: no network, one thread a process, no time limits inside Hypothesis."""

import gc
import os

# Before torch, numba or a tokenizer is imported: the machine's two cores are shared by the processes under test.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import pytest
from hypothesis import settings

from tests.effort import THOROUGH

settings.register_profile("flowkv", deadline=None, print_blob=True)
settings.load_profile("flowkv")

# They start servers and wait for them, up to minutes a file; the rest, seconds each, lets all workers end together.
_FIRST = ("tests/e2e/test_two_nodes.py", "tests/e2e/", "tests/heavy/", "tests/browser/", "tests/test_cli.py")


def pytest_collectstart() -> None:
    """Called by those who collect, which the parent of test processes does not."""
    gc.disable()  # until all tests are imported: what could be freed by then is not worth the search


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow ones to `make test-all`, and the long ones for no worker's end."""
    if not THOROUGH:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    items.sort(key=_place)
    _skip_gpu(items)


def _place(item: pytest.Item) -> int:
    return next((i for i, start in enumerate(_FIRST) if item.nodeid.startswith(start)), len(_FIRST))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays, and is not looked at again
    gc.enable()


def _skip_gpu(items: list[pytest.Item]) -> None:
    """What needs one, where there is none. torch is loaded only if such a test was collected."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
