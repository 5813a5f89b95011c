"""`POST /admin/...`: what operators can do to a running cluster."""

import secrets

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flowkv.errors import RequestError
from flowkv.messages import DrainCluster, FlipInstance, RestartInstances
from flowkv.server.api.endpoint import Endpoint, json_response
from flowkv.server.frontend import Frontend
from flowkv.types import Role


class Drained(msgspec.Struct):
    """The server ends when this many requests have, or after so long."""

    num_requests: int
    timeout_s: float


class Restarted(msgspec.Struct):
    """They are restarted one after another; `GET /cluster` shows under `rolling` how far that is."""

    instances: list[str]
    token: str  # of `rolling`, from when it has begun


class Flipped(msgspec.Struct):
    """`GET /cluster` shows the new role when the instance has taken it."""

    instance: str
    role: Role


class AdminApi:
    def __init__(self, frontend: Frontend, drain_timeout_s: float) -> None:
        self._frontend = frontend
        self._drain_timeout_s = drain_timeout_s

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                path="/admin/drain", method="POST", handler=self.drain, answer=Drained,
                summary="Take no new requests, finish the others, and end the server",
            ),
            Endpoint(
                path="/admin/restart", method="POST", handler=self.restart, answer=Restarted, errors=(404, 503),
                summary="Restart all instances, or those named by `instance`, one after another, losing nothing",
            ),
            Endpoint(
                path="/admin/flip", method="POST", handler=self.flip, answer=Flipped, errors=(400, 404, 503),
                summary="Give the instance named by `instance` the role named by `role`",
            ),
        ]  # fmt: skip

    async def drain(self, request: Request) -> Response:
        self._frontend.tell_launcher(DrainCluster())
        return json_response(Drained(self._frontend.num_live, self._drain_timeout_s))

    async def restart(self, request: Request) -> Response:
        names = request.query_params.getlist("instance")
        known = self._instances()
        for name in names:
            _check(name, known)
        asked = RestartInstances(names or known, secrets.token_hex(8))
        self._frontend.tell_controller(asked)
        return json_response(Restarted(asked.instances, asked.token))

    async def flip(self, request: Request) -> Response:
        name, text = request.query_params.get("instance", ""), request.query_params.get("role", "")
        known = self._instances()
        if text not in set(Role):
            roles = ", ".join(Role)
            raise RequestError(f"role is one of {roles}, not {text[:100]!r}", param="role", code="invalid_role")
        _check(name, known)
        self._frontend.tell_controller(FlipInstance(name, Role(text)))
        return json_response(Flipped(name, Role(text)))

    def _instances(self) -> list[str]:
        """RequestError (503) while none is known."""
        status = self._frontend.status
        if status is None or not status.instances:
            raise RequestError("the cluster is not ready yet", status=503, code="not_ready")
        return [instance.name for instance in status.instances]


def _check(name: str, known: list[str]) -> None:
    if name not in known:
        reason = f"there is no instance {name[:100]!r}; there are {', '.join(known)}"
        raise RequestError(reason, status=404, param="instance", code="instance_not_found")
