"""Whether spans are sent to an OpenTelemetry collector, and where."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from flowkv.config import TracingConfig
from flowkv.errors import ConfigError
from flowkv.server.records.journal import Listener
from flowkv.server.records.timeline import RequestRecord

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_MISSING = "OpenTelemetry is not installed: pip install 'flowkv[otel]'"

_logger = logging.getLogger(__name__)


class Spans(Protocol):
    def add(self, record: RequestRecord) -> None:
        """Send the spans of a request that has ended, some time soon. Never waits."""

    def close(self) -> None:
        """Send what is left, if that does not take long."""


@contextmanager
def sending_spans(config: TracingConfig, environ: Mapping[str, str], model_name: str) -> Iterator[list[Listener]]:
    """Who wants to hear of each request that ends: nobody, or the one who sends spans."""
    spans = open_spans(config, environ, model_name)
    try:
        yield [] if spans is None else [spans.add]
    finally:
        if spans is not None:
            spans.close()


def open_spans(config: TracingConfig, environ: Mapping[str, str], model_name: str) -> Spans | None:
    """None where nobody asks for spans. ConfigError if the configuration does and the packages are not there; where
    only the environment does, as it may for everything on a machine, that is a line in the log."""
    if config.otlp_endpoint is None and not _asks_for_spans(environ):
        return None
    try:
        from flowkv.server.records.otel import OtelSpans  # heavy, and an extra
    except ImportError as error:
        if config.otlp_endpoint is not None:
            raise ConfigError(f"tracing.otlp_endpoint: {_MISSING}") from error
        _logger.warning("no spans are sent, though the environment asks for them: %s", _MISSING)
        return None
    return OtelSpans.over_http(config.otlp_endpoint, model_name)


def _asks_for_spans(environ: Mapping[str, str]) -> bool:
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
    return not is_off and any(environ.get(name) for name in ENDPOINT_VARIABLES)
