"""Routes that say how the server is: its model, its health, its load. None of them takes a body."""

import time
from importlib.metadata import PackageNotFoundError, version

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flowkv.server.api.endpoint import Endpoint, json_response
from flowkv.server.api.text_service import TextService
from flowkv.server.records.cluster_view import ClusterView
from flowkv.types import InstanceLoad


class ModelCard(msgspec.Struct):
    """`max_model_len`, in tokens, is known once the cluster is ready."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "flowkv"
    max_model_len: int | msgspec.UnsetType = msgspec.UNSET


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


class Health(msgspec.Struct):
    status: str


class Version(msgspec.Struct):
    version: str


class ServerLoad(msgspec.Struct):
    """Requests that this frontend has open, and what the instances hold, of any frontend, as last reported."""

    server_load: int
    num_running: int  # requests in prefill, and choices that decode
    num_waiting: int  # requests whose prefill has not begun
    used_blocks: int
    num_blocks: int
    kv_used_fraction: float


class StatusApi:
    def __init__(self, service: TextService) -> None:
        self._service = service
        self._frontend = service.frontend
        self._created = int(time.time())

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(path="/v1/models", handler=self.models, answer=ModelList, summary="The one model served"),
            Endpoint(
                path="/v1/models/{model:path}", handler=self.model, answer=ModelCard, summary="A model", errors=(404,)
            ),
            Endpoint(path="/health", handler=self.health, answer=Health, summary="This process lives"),
            Endpoint(
                path="/ready", handler=self.ready, answer=Health, summary="Requests can be answered",
                others=((503, Health),),
            ),
            Endpoint(
                path="/metrics", handler=self.metrics, summary="Prometheus metrics",
                media_type="text/plain; version=0.0.4",
            ),
            Endpoint(path="/cluster", handler=self.cluster, answer=ClusterView, summary="The cluster in JSON"),
            Endpoint(path="/load", handler=self.load, answer=ServerLoad, summary="What is running and waiting"),
            Endpoint(path="/version", handler=self.version, answer=Version, summary="Of FlowKV"),
        ]  # fmt: skip

    async def models(self, request: Request) -> Response:
        return json_response(ModelList([self._card()]))

    async def model(self, request: Request) -> Response:
        self._service.check_model(request.path_params["model"])
        return json_response(self._card())

    async def health(self, request: Request) -> Response:
        """This process lives, whatever the cluster does."""
        return json_response(Health("ok"))

    async def ready(self, request: Request) -> Response:
        is_ready = self._frontend.is_ready
        return json_response(Health("ready" if is_ready else "not ready"), 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._frontend.metrics.render(), media_type="text/plain; version=0.0.4")

    async def cluster(self, request: Request) -> Response:
        return json_response(self._frontend.view())

    async def load(self, request: Request) -> Response:
        statuses = [] if self._frontend.status is None else self._frontend.status.instances
        loads: list[InstanceLoad] = [status.load for status in statuses]
        used_blocks = sum(load.used_blocks for load in loads)
        num_blocks = sum(status.num_blocks for status in statuses)
        load = ServerLoad(
            server_load=self._frontend.num_live,
            num_running=sum(load.num_prefilling + load.num_decoding for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            used_blocks=used_blocks,
            num_blocks=num_blocks,
            kv_used_fraction=used_blocks / max(1, num_blocks),
        )
        return json_response(load)

    async def version(self, request: Request) -> Response:
        return json_response(Version(_version()))

    def _card(self) -> ModelCard:
        card = ModelCard(self._service.model_name, self._created)
        status = self._frontend.status
        if status is not None and status.model is not None:
            card.max_model_len = min(status.max_request_tokens, status.model.max_model_tokens)
        return card


def _version() -> str:
    try:
        return version("flowkv")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
