"""What every process of a cluster logs, and how: lines for people, or one JSON object a line, on stderr.

A line that concerns a request names it: `_logger.warning("...", extra={"request_id": ...})`. More facts go into
`extra={"fields": {...}}`, which JSON shows as members. Prompts and answers are in no line.
"""

import logging
import sys
import time
from typing import Any, TextIO

import msgspec

from flowkv.config import LoggingConfig

_MESSAGE_KEYS = ("time", "level", "process", "logger", "message", "request_id", "exception")


def set_up_logging(config: LoggingConfig, process: str, stream: TextIO | None = None) -> None:
    """For the process of that name; what was set up before is replaced."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(process) if config.format == "json" else TextLines(process))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)


class TextLines(logging.Formatter):
    """`flowkv: 14:03:07.123 decode-0: warning: what (request cmpl-1-0)`; a line without a level is news."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        request_id = getattr(record, "request_id", None)
        request = "" if request_id is None else f" (request {request_id})"
        at = f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03}"
        text = f"flowkv: {at} {self._process}: {level}{record.getMessage()}{request}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonLines(logging.Formatter):
    """Members: time (ISO 8601, UTC), level, process, logger, message; where there are any request_id, exception, and
    whatever `fields` has."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := getattr(record, "request_id", None)) is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        fields: dict[str, Any] = getattr(record, "fields", {})
        line |= {name: value for name, value in fields.items() if name not in _MESSAGE_KEYS}
        return msgspec.json.encode(line).decode()
