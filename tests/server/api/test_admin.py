import pytest

from flowkv.messages import FlipInstance, Message, RestartInstances
from flowkv.types import Role
from tests.server.conftest import Served


def heard(served: Served, kind: type[Message]) -> list[Message]:
    def have_come() -> bool:
        return any(isinstance(message, kind) for message in served.cluster.received)

    served.cluster.wait_for(have_come)
    return [message for message in served.cluster.received if isinstance(message, kind)]


@pytest.mark.parametrize("query", ["", "?instance=p0.1"])
def test_a_restart_names_what_is_restarted(served: Served, query: str) -> None:
    answer = served.client.post(f"/admin/restart{query}").json()
    assert answer["instances"] == ["p0.1"]
    assert heard(served, RestartInstances) == [RestartInstances(["p0.1"], answer["token"])]


def test_a_flip(served: Served) -> None:
    answer = served.client.post("/admin/flip?instance=p0.1&role=decode").json()
    assert answer == {"instance": "p0.1", "role": "decode"}
    assert heard(served, FlipInstance) == [FlipInstance("p0.1", Role.DECODE)]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/admin/restart?instance=p9", 404, "instance_not_found"),
        ("/admin/flip?instance=p9&role=decode", 404, "instance_not_found"),
        ("/admin/flip?instance=p0.1&role=nurse", 400, "invalid_role"),
        ("/admin/flip", 400, "invalid_role"),
    ],
)
def test_what_cannot_be_done_is_refused(served: Served, path: str, status: int, code: str) -> None:
    response = served.client.post(path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert served.client.get(path).status_code == 405
