import io
import json
import logging
from collections.abc import Iterator

import pytest

from flowkv.config import LoggingConfig
from flowkv.logs import set_up_logging

logger = logging.getLogger("flowkv.some.place")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Other tests find the root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(config: LoggingConfig) -> io.StringIO:
    stream = io.StringIO()
    set_up_logging(config, "decode-0", stream)
    return stream


def test_a_line_of_text_says_who_and_which_request() -> None:
    stream = logged(LoggingConfig())
    logger.warning("lost %d blocks", 3, extra={"request_id": "cmpl-1-0"})
    _, at, line = stream.getvalue().split(" ", 2)
    assert at.count(":") == 2
    assert line == "decode-0: warning: lost 3 blocks (request cmpl-1-0)\n"


def test_a_json_line_is_one_object() -> None:
    stream = logged(LoggingConfig(format="json", level="info"))
    logger.info("two\nlines", extra={"request_id": "cmpl-1-0", "fields": {"status": 200, "level": "mine"}})
    assert stream.getvalue().count("\n") == 1
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info", "process": "decode-0", "logger": "flowkv.some.place", "message": "two\nlines",
        "request_id": "cmpl-1-0", "status": 200,
    }  # fmt: skip


def test_a_traceback_stays_in_its_line() -> None:
    stream = logged(LoggingConfig(format="json"))
    try:
        raise ValueError("what it was")
    except ValueError:
        logger.exception("failed")
    line = json.loads(stream.getvalue())
    assert "ValueError: what it was" in line["exception"]


def test_what_is_below_the_level_is_not_said() -> None:
    stream = logged(LoggingConfig(level="error"))
    logger.warning("not this")
    assert stream.getvalue() == ""
