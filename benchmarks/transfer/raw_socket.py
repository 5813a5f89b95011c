"""Plain TCP sockets between two processes: what a network stack gives to anybody who only sends."""

import socket
from collections.abc import Callable
from threading import Thread

from benchmarks import BenchmarkError
from benchmarks.transfer.sides import Channel

_CALL_BYTES = 128 << 10  # received in one call, at most: what stays in a core's cache


class RawSockets:
    """`num_streams` connections from the source to the target, which listens at `address`.

    `socket_bytes` is the size of the kernel's buffers of each, 0 for those that grow by themselves.
    """

    def __init__(self, channel: Channel, address: str, num_streams: int, socket_bytes: int, is_source: bool) -> None:
        if is_source:
            port = channel.receive()
            self._sockets = [_connect(address, port, socket_bytes) for _ in range(num_streams)]
        else:
            with socket.socket() as listener:
                _set_buffers(listener, socket_bytes)  # inherited by what is accepted, before the window is scaled
                listener.bind((address, 0))
                listener.listen(num_streams)
                channel.send(listener.getsockname()[1])
                self._sockets = [listener.accept()[0] for _ in range(num_streams)]
        channel.exchange("connected")

    def send(self, data: memoryview) -> None:
        self._each(data, lambda connection, part: connection.sendall(part))

    def receive(self, data: memoryview) -> None:
        self._each(data, _receive_all)

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()

    def _each(self, data: memoryview, move: Callable[[socket.socket, memoryview], None]) -> None:
        share = -(-len(data) // len(self._sockets))
        pairs = [(connection, data[i * share : (i + 1) * share]) for i, connection in enumerate(self._sockets)]
        threads = [Thread(target=move, args=pair) for pair in pairs[1:]]
        for thread in threads:
            thread.start()
        move(*pairs[0])
        for thread in threads:
            thread.join()


def _receive_all(connection: socket.socket, part: memoryview) -> None:
    received = 0
    while received < len(part):
        count = connection.recv_into(part[received : received + _CALL_BYTES])
        if not count:
            raise BenchmarkError("a raw socket was closed")
        received += count


def _connect(address: str, port: int, socket_bytes: int) -> socket.socket:
    connection = socket.socket()
    _set_buffers(connection, socket_bytes)
    connection.connect((address, port))
    return connection


def _set_buffers(connection: socket.socket, socket_bytes: int) -> None:
    if socket_bytes:
        for force in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE: beyond the system's bound, for root
            connection.setsockopt(socket.SOL_SOCKET, force, socket_bytes)
