"""What clients of OpenAI-compatible servers ask for and FlowKV does not have: a clear 400 rather than a 404."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flowkv.errors import RequestError
from flowkv.server.api.endpoint import Handler

PATHS = {
    "embeddings": ("/v1/embeddings", "/pooling", "/classify", "/v1/classify"),
    "reranking and scores": ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"),
    "images": ("/v1/images/{rest:path}",),
    "audio": ("/v1/audio/{rest:path}", "/v1/realtime"),
    "video": ("/v1/videos", "/v1/videos/{rest:path}"),
    "moderations": ("/v1/moderations",),
    "LoRA adapters": ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    "stored answers": ("/v1/responses/{rest:path}", "/v1/conversations", "/v1/conversations/{rest:path}"),
    "fine-tuning": ("/v1/fine_tuning/{rest:path}",),
    "files and batches": ("/v1/files", "/v1/files/{rest:path}", "/v1/batches", "/v1/batches/{rest:path}"),
    "assistants and threads": (
        "/v1/assistants", "/v1/assistants/{rest:path}", "/v1/threads", "/v1/threads/{rest:path}", "/v1/vector_stores",
    ),
}  # fmt: skip


def routes() -> list[Route]:
    return [
        Route(path, _refusal(what), methods=["GET", "POST", "DELETE"])
        for what, paths in PATHS.items()
        for path in paths
    ]


def _refusal(what: str) -> Handler:
    async def refuse(request: Request) -> Response:
        raise RequestError(f"{request.url.path}: this server has no {what}", code="unsupported")

    return refuse
