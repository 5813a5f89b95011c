"""Every route there is, and for whom: one that is added is put into this table by somebody who has thought of it."""

import re

from flowkv.config import ServerConfig
from flowkv.server.access.doors import Audience, access_of
from tests.server.conftest import Served

CLIENTS, OPERATORS, ADMINS, EVERYBODY = Audience.CLIENTS, Audience.OPERATORS, Audience.ADMINS, Audience.EVERYBODY
AUDIENCES = {
    "/v1/.*": CLIENTS, "/tokenize": CLIENTS, "/detokenize": CLIENTS, "/version": CLIENTS, "/load": CLIENTS,
    "/openapi.json": CLIENTS,
    "/metrics": OPERATORS, "/cluster": OPERATORS, "/dashboard.*": OPERATORS, "/requests": OPERATORS,
    "/debug/.*": OPERATORS,
    "/admin/.*": ADMINS,
    "/health": EVERYBODY, "/ready": EVERYBODY,
}  # fmt: skip


def test_every_route_is_for_whom_it_should_be(served: Served) -> None:
    access, _ = access_of(ServerConfig(), {})
    paths = served.client.get("/openapi.json").json()["paths"]
    assert len(paths) > 20
    for path in paths:
        expected = [audience for pattern, audience in AUDIENCES.items() if re.fullmatch(pattern, path)]
        assert [access.audience(path)] == expected, path
