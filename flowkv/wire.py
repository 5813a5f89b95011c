"""Messages on the wire: msgpack frames in ZeroMQ mailboxes.

Every process owns one `Mailbox` (a PULL socket) and writes to those of others through an `Outbox` (one PUSH socket a
peer). Delivery between two processes is in order; nothing is promised across three.
"""

import logging
from typing import cast

import msgspec
import zmq
import zmq.asyncio

from flowkv.errors import ConfigError, ProtocolError
from flowkv.messages import AnyMessage, Message

MAX_IPC_PATH_BYTES = 107  # sun_path of Linux is 108 bytes, the closing zero included

_logger = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)

SyncContext = zmq.Context[zmq.SyncSocket]


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyMessage:
    """Raises `ProtocolError` for anything that is not one whole, known and well-typed message."""
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"undecodable message of {len(frame)} bytes: {error}") from error


def check_address(address: str) -> None:
    """Raises `ConfigError` where the path of an `ipc://` address does not fit into a Unix socket's name."""
    if not address.startswith("ipc://"):
        return
    num_bytes = len(address.removeprefix("ipc://").encode())
    if num_bytes > MAX_IPC_PATH_BYTES:
        raise ConfigError(
            f"the socket path {address!r} is {num_bytes} bytes long, more than the {MAX_IPC_PATH_BYTES} that a Unix "
            "socket allows: choose a shorter folder for run files"
        )


class Mailbox:
    """What one process receives. `address` is where peers write to, with the port filled in where tcp chose one."""

    def __init__(self, context: SyncContext, address: str) -> None:
        """Raises `ConfigError` where the address is too long or cannot be bound."""
        check_address(address)
        self.socket = context.socket(zmq.PULL)
        # No bound: a message that is dropped or blocks its sender could break the protocol, and how many there can
        # be is bounded by the requests that the controller has admitted.
        self.socket.rcvhwm = 0
        self.socket.linger = 0
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.socket.close()
            raise ConfigError(f"cannot listen at {address}: {error}") from error
        self.address = cast(bytes, self.socket.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def receive_all(self) -> list[AnyMessage]:
        """All messages that are there now, without waiting. Poll `socket` for when there are some.

        A frame that does not decode is logged and dropped: whoever sent it must not take the receiver down.
        """
        messages: list[AnyMessage] = []
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            self._append_decoded(messages, frame)

    def close(self) -> None:
        self.socket.close()

    @staticmethod
    def _append_decoded(messages: list[AnyMessage], frame: bytes) -> None:
        try:
            messages.append(decode(frame))
        except ProtocolError as error:
            _logger.warning("dropped an %s", error)


class AsyncMailbox(Mailbox):
    """The same for asyncio. Make and use it inside a running event loop."""

    def __init__(self, context: SyncContext, address: str) -> None:
        super().__init__(context, address)
        self._async_socket = zmq.asyncio.Socket.shadow(self.socket.underlying)

    async def receive(self) -> list[AnyMessage]:
        """Waits for a frame, then returns all messages that are there (none, if the frame did not decode)."""
        messages: list[AnyMessage] = []
        self._append_decoded(messages, await self._async_socket.recv())
        messages.extend(self.receive_all())
        return messages

    def close(self) -> None:
        self._async_socket.close()
        super().close()


class Outbox:
    """Sends to any mailbox by address. Sending never blocks and never fails: a peer that is gone reads nothing."""

    def __init__(self, context: SyncContext) -> None:
        self._context = context
        self._sockets: dict[str, zmq.SyncSocket] = {}

    def send(self, address: str, message: Message) -> None:
        """Raises `ConfigError` for an `ipc://` path that is too long."""
        socket = self._sockets.get(address) or self._connect(address)
        socket.send(encode(message), zmq.NOBLOCK)

    def drop(self, address: str) -> None:
        """Forget a peer that is gone, and what it has not read."""
        socket = self._sockets.pop(address, None)
        if socket is not None:
            socket.close(linger=0)

    def close(self, linger_s: float = 1.0) -> None:
        """What was sent last (why a process ends, for instance) has `linger_s` to leave before the context ends."""
        for socket in self._sockets.values():
            socket.close(linger=int(linger_s * 1000))
        self._sockets.clear()

    def _connect(self, address: str) -> zmq.SyncSocket:
        check_address(address)
        socket = self._context.socket(zmq.PUSH)
        socket.sndhwm = 0  # as in Mailbox: bounded by admitted requests
        socket.linger = 0
        socket.connect(address)
        self._sockets[address] = socket
        return socket
