"""Ports, keys and other nodes."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from flowkv.auth import KEY_VARIABLE, ClusterKey, read_key
from flowkv.config import ClusterConfig
from flowkv.doctor.finding import Finding, fail, ok, warn
from flowkv.errors import ConfigError
from flowkv.launch.addresses import check_local, resolve_endpoint
from flowkv.server.access.site import Site, listen
from flowkv.wire import SyncContext, tcp_address

_CONNECT_S = 3.0
_WELCOME = zmq.EVENT_HANDSHAKE_SUCCEEDED
_TURNED_AWAY = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def http(config: ClusterConfig) -> Finding:
    """Addresses, keys and certificates, as the frontend would open them."""
    try:
        with Site(config.server, config.limits) as site:
            urls = " and ".join(site.urls)
    except ConfigError as error:
        return fail("HTTP", str(error), "docs/security.md; ss -ltnp shows who has a port, --port 0 takes any free one")
    return ok("HTTP", f"{urls} can be opened")


def cluster_port(config: ClusterConfig) -> Iterator[Finding]:
    """Where other nodes join. Nothing, where none can."""
    if config.network.listen is None:
        return
    yield _key_finding(config)
    try:
        host, port = resolve_endpoint(config.network.listen)
        check_local(host)
        listen(host, port).close()
    except ConfigError as error:
        yield fail("cluster port", str(error), "an address of this node and a free port in --listen HOST:PORT")
    else:
        yield ok("cluster port", f"{host}:{port} is free")


def controller(config: ClusterConfig, address: str) -> Iterator[Finding]:
    """Whether `flowkv join` would be let in: a connection, and a handshake with the key. Nothing is sent."""
    try:
        host, port = resolve_endpoint(address)
        socket.create_connection((host, port), _CONNECT_S).close()
    except (ConfigError, OSError) as error:
        advice = "is flowkv serve --listen running there, and does a firewall let this port through?"
        yield fail("controller", f"{address} cannot be reached: {error}", advice)
        return
    yield ok("controller", f"{address} answers")
    yield (found := _key_finding(config))
    if found.advice:
        return
    yield _handshake(address, tcp_address(host, port), _key(config))


def _handshake(name: str, address: str, key: ClusterKey | None) -> Finding:
    assert key is not None
    context: SyncContext = zmq.Context()
    peer = context.socket(zmq.PUSH)
    monitor = peer.get_monitor_socket(_WELCOME | _TURNED_AWAY)
    try:
        key.identify(peer)
        peer.linger = 0
        peer.connect(address)
        is_answered = monitor.poll(int(_CONNECT_S * 1000))
        event = recv_monitor_message(monitor)["event"] if is_answered else None
    finally:
        peer.disable_monitor()
        monitor.close()
        peer.close()
        context.term()
    if event == _WELCOME:
        return ok("handshake", f"{name} takes this key")
    advice = "the same key file on every node; and is it a FlowKV controller that listens there?"
    return fail("handshake", f"{name} does not take this key", advice)


def _key_finding(config: ClusterConfig) -> Finding:
    try:
        key = _key(config)
    except ConfigError as error:
        return fail("cluster key", str(error), "flowkv key > cluster.key && chmod 600 cluster.key")
    if key is None:
        advice = f"--cluster-key-file FILE, or {KEY_VARIABLE}: flowkv key makes one"
        return fail("cluster key", "several nodes need a key that all of them share", advice)
    return ok("cluster key", "there, long enough, and closed to others")


def _key(config: ClusterConfig) -> ClusterKey | None:
    path = config.network.cluster_key_file
    return read_key(None if path is None else Path(path), os.environ)


def clock(is_synchronised: bool | None, is_networked: bool) -> Finding:
    """Nothing is decided by the time of day; logs and traces of several nodes are put together by it."""
    if is_synchronised is None:
        return ok("clock", "whether it is synchronised cannot be told from in here")
    if is_synchronised:
        return ok("clock", "synchronised")
    text = "not synchronised"
    if is_networked:
        return warn("clock", text, "chrony or systemd-timesyncd: logs of several nodes will not line up")
    return ok("clock", f"{text}, which one node alone does not need")
