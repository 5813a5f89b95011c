import gc
import sys
from importlib import import_module


def test_it_loads_the_model_s_side_and_leaves_garbage_collection_on() -> None:
    """The fork server says nothing of a module that it cannot load, and each instance would load it for itself."""
    num_frozen = gc.get_freeze_count()
    import_module("flowkv.engine.preload")
    assert "flowkv.engine.torch_model" in sys.modules
    assert gc.isenabled()
    assert gc.get_freeze_count() > num_frozen
