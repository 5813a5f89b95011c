"""A cluster that listens on the network, and strangers at every port of it."""

import contextlib
import os
import re
import socket
import stat
from pathlib import Path

import psutil
import zmq

from flowkv import messages as m
from flowkv.auth import KEY_VARIABLE, ClusterKey, new_key
from flowkv.wire import SyncContext, encode
from tests.e2e.server import Server, eventually, serving

KEY = new_key()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def ports_of(server: Server) -> dict[int, str]:
    """Every TCP port that a process of the server listens on, with the process."""
    http = server.client.base_url.port
    return {
        connection.laddr.port: psutil.Process(pid).name()
        for pid in server.processes()
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port != http
    }


def counted(server: Server, name: str) -> dict[str, float]:
    pattern = re.compile(rf'^{name}{{where="([^"]+)"}} (\S+)$', re.M)
    return {match[1]: float(match[2]) for match in pattern.finditer(server.client.get("/metrics").text)}


def knock(port: int, *, key: str | None) -> None:
    """With the key of another cluster, or none, and a message that would stop an instance."""
    context = SyncContext()
    stranger = context.socket(zmq.PUSH)
    if key is not None:
        ClusterKey.derive(key).identify(stranger)
    stranger.connect(f"tcp://127.0.0.1:{port}")
    for message in (m.Drain(), m.InstanceExited("prefill-0", "forged"), m.Abort("r0")):
        with contextlib.suppress(zmq.Again):  # refused already: there is nobody to send to, and never will be
            stranger.send(encode(message), zmq.NOBLOCK)
    stranger.poll(50)
    stranger.close(linger=200)
    context.term()


def test_strangers_are_refused_and_counted_at_every_port() -> None:
    listen = ("--toy", "--listen", f"127.0.0.1:{free_port()}", "--set", "transfer.backend=shm")
    with serving(*listen, environment={KEY_VARIABLE: KEY}) as server:
        ports = ports_of(server)
        assert set(ports.values()) == {"controller", "frontend", "prefill-0", "decode-0"}
        for port in ports:
            knock(port, key=None)
            knock(port, key=new_key())
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"GET /admin/drain HTTP/1.1\r\n\r\n")
        eventually(
            lambda: (
                {where for where, number in counted(server, "flowkv_strangers_total").items() if number >= 3}
                == set(ports.values())
            ),
            "all have counted everybody",
        )
        answer = server.client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3})
        assert answer.status_code == 200
        assert counted(server, "flowkv_messages_ignored_total").keys() == set(ports.values())
        assert not any(counted(server, "flowkv_messages_ignored_total").values())
        assert any("turned away a connection that does not hold the cluster's key" in line for line in server.lines)


def test_nobody_else_can_reach_what_processes_of_a_node_share() -> None:
    """Sockets are in a folder that is the owner's alone, and KV pools have no name that anybody could open."""
    with serving("--toy") as server:
        folder = server.run_folder()
        for one in folder.parent.iterdir():  # that of Python's multiprocessing too
            assert stat.S_IMODE(one.stat().st_mode) == 0o700, one
            assert one.stat().st_uid == os.getuid()
        pools = [
            link
            for pid in server.processes()
            for link in map(os.readlink, Path(f"/proc/{pid}/fd").iterdir())
            if "flowkv-pool" in link
        ]
        assert pools and all(link.startswith("/memfd:") for link in pools)
        assert not list(Path("/dev/shm").glob("*flowkv*"))
        assert ports_of(server) == {}  # all else that listens is in that folder
