import re

import pytest

from tests.e2e import server
from tests.e2e.server import Launched, cleared_up


def test_what_stays_behind_fails_the_test_and_does_not_hang_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it keeps the pipe open that is read."""
    monkeypatch.setattr(server, "_LAST_LINES_S", 0.1)
    launched = Launched((), re.compile("up"), prefix=("sh", "-c", "sleep 600 & echo up >&2"))
    with pytest.raises(AssertionError, match="left processes behind"), cleared_up(launched):
        pass
