"""`/dashboard`: a page that shows the cluster, and `/dashboard/data`, which it asks every second."""

import time
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flowkv import __version__
from flowkv.errors import RequestError
from flowkv.server.api.endpoint import Endpoint
from flowkv.server.api.text_service import TextService
from flowkv.server.records.events import Event
from flowkv.server.records.history import WINDOW_S, Recent, Second
from flowkv.server.records.timeline import RequestRecord
from flowkv.server.records.watch import InstanceRow
from flowkv.types import Regime

NUM_SLOWEST = 12
FOLDER = Path(__file__).parents[1] / "static" / "dashboard"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but the page's own files: what a request or a model is called can never become code here, or leave.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class DashboardData(msgspec.Struct, frozen=True, kw_only=True):
    """Times are of the frontend's clock, which begins anywhere; `now_s` is when this was said.

    The page holds on to `seconds`, asks for those after the last (`?since=TICK`), and forgets them when `frontend` is
    another one.
    """

    frontend: str
    version: str
    now_s: float
    window_s: int
    is_ready: bool
    status_age_s: float | None  # since the controller was heard; None: it never was
    model_name: str
    regime: Regime
    num_live: int  # requests
    num_flips: int
    num_refused: int
    recent: Recent
    seconds: list[Second]
    events: list[Event]
    instances: list[InstanceRow]
    slowest: list[RequestRecord]  # of the last ten minutes, the slowest first


class Dashboard:
    """The files are read once: a path of a request never reaches the file system."""

    def __init__(self, service: TextService) -> None:
        self._frontend = service.frontend
        self._model_name = service.model_name
        self._files = {path.name: path.read_bytes() for path in FOLDER.iterdir()}

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                path="/dashboard", handler=self.page, summary="A page that shows the cluster", media_type="text/html"
            ),
            Endpoint(
                path="/dashboard/data", handler=self.data, answer=DashboardData, summary="What that page shows",
                errors=(400,), query=("since",),
            ),
            Endpoint(
                path="/dashboard/{name}", handler=self.file, summary="A file of that page", errors=(404,),
                media_type="*/*",
            ),
        ]  # fmt: skip

    async def page(self, request: Request) -> Response:
        return self._file("index.html")

    async def file(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    async def data(self, request: Request) -> Response:
        found = self._data(_tick(request.query_params.get("since", "0")))
        headers = _HEADERS | {"cache-control": "no-store"}
        return Response(msgspec.json.encode(found), media_type="application/json", headers=headers)

    def _file(self, name: str) -> Response:
        if name not in self._files:
            raise RequestError(f"the dashboard has no file {name!r}", status=404)
        return Response(self._files[name], media_type=_MEDIA_TYPES[Path(name).suffix], headers=_HEADERS)

    def _data(self, since: int) -> DashboardData:
        frontend = self._frontend
        now_s, view = frontend.now_s(), frontend.view()
        return DashboardData(
            frontend=frontend.epoch,
            version=__version__,
            now_s=now_s,
            window_s=WINDOW_S,
            is_ready=view.is_ready,
            status_age_s=None if frontend.status is None else view.age_s,
            model_name=self._model_name,
            regime=view.regime,
            num_live=frontend.num_live,
            num_flips=view.num_flips,
            num_refused=view.num_refused,
            recent=frontend.history.recent(now_s),
            seconds=frontend.history.since(now_s, since),
            events=[event for event in frontend.watch.events if event.time_s > now_s - WINDOW_S],
            instances=frontend.watch.rows(),
            slowest=frontend.journal.slowest(time.time())[:NUM_SLOWEST],
        )


def _tick(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestError(f"since is the number of a second, not {text!r}", param="since")
    return int(text)
