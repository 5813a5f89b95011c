"""How much of a test is run. `make test-all` sets FLOWKV_THOROUGH=1: all of it; `make test` runs a part."""

import os

THOROUGH = os.environ.get("FLOWKV_THOROUGH", "0") == "1"
_PART = 5


def seeds(most: int) -> range:
    """Of a test that is parametrized by them."""
    return range(most if THOROUGH else -(-most // _PART))


def examples(most: int) -> int:
    """Of a property, for `hypothesis.settings`."""
    return most if THOROUGH else -(-most // _PART)
