"""What became of requests, and where their time went: those that run, the last ones, the slowest ones."""

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flowkv.errors import RequestError
from flowkv.server.api.endpoint import Endpoint, json_response
from flowkv.server.frontend import Frontend
from flowkv.server.records.timeline import RequestRecord
from flowkv.server.records.trace import chrome_trace

DEFAULT_LIMIT = 50


class RequestsView(msgspec.Struct, frozen=True, kw_only=True):
    """`live` the oldest first, `recent` the latest first, `slowest` of the last ten minutes, the slowest first."""

    at: float  # Unix time, s
    num_live: int
    live: list[RequestRecord]
    recent: list[RequestRecord]
    slowest: list[RequestRecord]


class RequestsApi:
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                path="/requests", handler=self.requests, answer=RequestsView, errors=(400,), query=("limit",),
                summary="Timelines of requests: running, last, slowest",
            ),
            Endpoint(
                path="/debug/trace", handler=self.trace, errors=(400,), query=("limit",),
                summary="The last requests as a Chrome trace, for ui.perfetto.dev",
            ),
        ]  # fmt: skip

    async def requests(self, request: Request) -> Response:
        """`?limit=N`: at most so many in each list."""
        limit = _limit(request.query_params.get("limit"))
        live, journal, now_at = self._frontend.live_records(), self._frontend.journal, time.time()
        view = RequestsView(
            at=now_at,
            num_live=len(live),
            live=live[:limit],
            recent=journal.recent[:limit],
            slowest=journal.slowest(now_at)[:limit],
        )
        return json_response(view)

    async def trace(self, request: Request) -> Response:
        """`?limit=N`: of the last N; all that are kept, unless said otherwise."""
        records = self._frontend.journal.recent
        text = request.query_params.get("limit")
        return json_response(chrome_trace(records if text is None else records[: _limit(text)]))


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestError(f"limit is a number of requests, not {text!r}", param="limit")
    return int(text)
