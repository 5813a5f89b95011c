import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from flowkv.auth import KEY_VARIABLE, ClusterKey, new_key
from flowkv.config import ClusterConfig, load_config
from flowkv.doctor import network
from flowkv.doctor.finding import Level
from flowkv.wire import Mailbox


@pytest.fixture
def key() -> str:
    return new_key()


@pytest.fixture
def controller(key: str) -> Iterator[str]:
    """The address of a mailbox that takes the key."""
    context: zmq.Context[zmq.SyncSocket] = zmq.Context()
    mailbox = Mailbox(context, "tcp://127.0.0.1:*", ClusterKey.derive(key))
    yield mailbox.address.removeprefix("tcp://")
    mailbox.close()
    context.term()


def config(**changed: object) -> ClusterConfig:
    return load_config(None, {"toy": True, "server.port": 0} | changed, [])


def levels(address: str) -> dict[str, Level]:
    return {finding.check: finding.level for finding in network.controller(config(), address)}


def test_a_free_port_and_a_busy_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        found = network.http(config(**{"server.port": port}))
        assert found.level is Level.FAIL and f"port {port}" in found.text
    assert network.http(config(**{"server.port": port})).level is Level.OK
    assert network.http(config(**{"server.host": "192.0.2.1"})).level is Level.FAIL


def test_keys_and_certificates_are_looked_at(tmp_path: Path) -> None:
    found = network.http(config(**{"server.api_key_file": str(tmp_path / "none")}))
    assert found.level is Level.FAIL and "cannot be read" in found.text
    files = {"server.tls_cert_file": str(tmp_path / "cert"), "server.tls_key_file": str(tmp_path / "key")}
    assert network.http(config(**files)).level is Level.FAIL


def test_the_port_of_a_cluster(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(network.cluster_port(config())) == []
    with socket.create_server(("127.0.0.1", 0)) as busy:
        here = f"127.0.0.1:{busy.getsockname()[1]}"
        listening = config(**{"network.listen": here})
        assert [finding.level for finding in network.cluster_port(listening)] == [Level.FAIL, Level.FAIL]
    monkeypatch.setenv(KEY_VARIABLE, key)
    assert [finding.level for finding in network.cluster_port(listening)] == [Level.OK, Level.OK]
    path = tmp_path / "key"
    path.write_text(key)
    path.chmod(0o644)
    found = next(network.cluster_port(config(**{"network.listen": here, "network.cluster_key_file": str(path)})))
    assert found.level is Level.FAIL and "chmod 600" in found.text


def test_a_controller_that_takes_the_key(controller: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    assert levels(controller) == {"controller": Level.OK, "cluster key": Level.OK, "handshake": Level.OK}


def test_a_controller_with_another_key(controller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_CONNECT_S", 0.3)
    monkeypatch.setenv(KEY_VARIABLE, new_key())
    assert levels(controller)["handshake"] is Level.FAIL


def test_without_a_key_there_is_no_handshake(controller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert levels(controller) == {"controller": Level.OK, "cluster key": Level.FAIL}


def test_nobody_there() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        assert levels(address) == {"controller": Level.FAIL}
    assert levels("127.0.0.1:99999") == {"controller": Level.FAIL}
