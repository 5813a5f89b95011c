import logging

import msgspec
import pytest

from flowkv.server.records.access_log import log_ended
from flowkv.server.records.timeline import State
from tests.server.records.test_timeline import ARRIVAL_S, split_request

RECORD = split_request().record(ARRIVAL_S + 9.0)


def test_a_request_that_ended_is_a_line_with_facts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_ended(msgspec.structs.replace(RECORD, key="alice"))
    [line] = caplog.records
    assert line.getMessage() == "finished (200, stop), 7 + 5 tokens, first token after 2.000 s, 5.000 s in all"
    assert line.request_id == "r"  # type: ignore[attr-defined]
    assert line.fields["key"] == "alice" and line.fields["ttft_s"] == 2.0  # type: ignore[attr-defined]


def test_what_the_cluster_refused_is_logged_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_ended(msgspec.structs.replace(RECORD, state=State.REFUSED))
    assert not caplog.records
