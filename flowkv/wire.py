"""Messages on the wire: msgpack frames in ZeroMQ mailboxes.

Every process owns one `Mailbox` (a PULL socket) and writes to those of others through an `Outbox` (one PUSH socket a
peer). Delivery between two processes is in order; nothing is promised across three.

Within a node mailboxes are at `ipc://` paths in a folder that only its owner may enter. Between nodes they are at
`tcp://HOST:PORT`, where both ends must hold the cluster's key (`flowkv.auth`).
"""

import logging
import time
from typing import cast

import msgspec
import zmq
import zmq.asyncio

from flowkv.auth import ClusterKey, Doorkeeper
from flowkv.errors import ConfigError, ProtocolError
from flowkv.messages import AnyMessage, Message, TurnedAway
from flowkv.throttle import Throttle

MAX_MESSAGE_BYTES = 128 << 20  # over tcp, where a stranger may send before he has to show a key
MAX_IPC_PATH_BYTES = 107  # sun_path of Linux is 108 bytes, the closing zero included
_DEAD_LINK_S = 20
_KEEPALIVE_PROBES = 3
_LAST_MS = 1000
_HANDSHAKE_MS = 10_000
_RECONNECT_MS, _MAX_RECONNECT_MS = 100, 2000

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


def tcp_address(host: str, port: int | str) -> str:
    """The address of a mailbox on a numeric `host`. A mailbox may be opened at port `*`: any free one."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _is_tcp(address: str) -> bool:
    return address.startswith("tcp://")


def _prepare_tcp(socket: zmq.SyncSocket, address: str) -> None:
    """The kernel finds dead links, not heartbeats of ZeroMQ: those also give up a peer that is only stopped, and what
    it then finds on its old connection and on its new one has no order."""
    socket.ipv6 = "[" in address
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = socket.tcp_keepalive_intvl = _DEAD_LINK_S // (_KEEPALIVE_PROBES + 1)
    socket.tcp_keepalive_cnt = _KEEPALIVE_PROBES
    socket.tcp_maxrt = _DEAD_LINK_S * 1000  # the same while something that was sent is not acknowledged
    socket.handshake_ivl = _HANDSHAKE_MS
    socket.reconnect_ivl, socket.reconnect_ivl_max = _RECONNECT_MS, _MAX_RECONNECT_MS


def _require_key(address: str, key: ClusterKey | None) -> ClusterKey:
    if key is None:
        raise ConfigError(f"{address} is open to the network, which takes the cluster's key")
    return key


class Mailbox:
    """What one process receives. `address` is where peers write to, with the port filled in where tcp chose one.

    In one context there is at most one mailbox on tcp.
    """

    def __init__(self, context: SyncContext, address: str, key: ClusterKey | None = None) -> None:
        """Raises `ConfigError` where the address is too long, cannot be bound, or is on tcp and there is no key."""
        check_address(address)
        member_key = _require_key(address, key) if _is_tcp(address) else None
        self._doorkeeper: Doorkeeper | None = None
        self._num_ignored = 0
        self._told = (0, 0)
        self._throttle = Throttle()
        self.socket = context.socket(zmq.PULL)
        # No bound: a message that is dropped or blocks its sender could break the protocol, and how many there can
        # be is bounded by the requests that the controller has admitted.
        self.socket.rcvhwm = 0
        self.socket.linger = 0
        if member_key is not None:
            _prepare_tcp(self.socket, address)
            self.socket.maxmsgsize = MAX_MESSAGE_BYTES
            member_key.open_to_members(self.socket)
            self._doorkeeper = Doorkeeper(context, member_key, self.socket)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            Mailbox.close(self)
            raise ConfigError(f"cannot listen at {address}: {error}") from error
        self.address = cast(bytes, self.socket.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def receive_all(self) -> list[AnyMessage]:
        """All messages that are there now, without waiting. Poll `socket` for when there are some.

        A frame that does not decode is ignored.
        """
        messages: list[AnyMessage] = []
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            self._append_decoded(messages, frame)

    def ignore(self, error: ProtocolError) -> None:
        """Of a message that makes no sense: counted and logged. Whoever sent it must not take the receiver down."""
        self._num_ignored += 1
        if (more := self._throttle.note("ignored", time.monotonic())) is not None:
            _logger.warning("%s ignored a message: %s%s", self.address.rpartition("/")[2], error, more)

    def take_turned_away(self, process: str) -> TurnedAway | None:
        """What was, since the last call; None if nothing was. `process` is whose mailbox this is."""
        now = (0 if self._doorkeeper is None else self._doorkeeper.num_refused, self._num_ignored)
        if now == self._told:
            return None
        before, self._told = self._told, now
        return TurnedAway(process, now[0] - before[0], now[1] - before[1])

    def close(self) -> None:
        self.socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()

    def _append_decoded(self, messages: list[AnyMessage], frame: bytes) -> None:
        try:
            messages.append(decode(frame))
        except ProtocolError as error:
            self.ignore(error)


class AsyncMailbox(Mailbox):
    """The same for asyncio. Make and use it inside a running event loop."""

    def __init__(self, context: SyncContext, address: str, key: ClusterKey | None = None) -> None:
        super().__init__(context, address, key)
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

    def __init__(self, context: SyncContext, key: ClusterKey | None = None) -> None:
        """`key` is for peers on tcp."""
        self._context = context
        self._key = key
        self._sockets: dict[str, zmq.SyncSocket] = {}

    def send(self, address: str, message: Message) -> None:
        """Raises `ConfigError` for what is no address, an `ipc://` path that is too long, and for tcp without a key."""
        socket = self._sockets.get(address) or self._connect(address)
        socket.send(encode(message), zmq.NOBLOCK)

    @property
    def addresses(self) -> list[str]:
        """Of those for whom a socket is kept."""
        return list(self._sockets)

    def send_last(self, address: str, message: Message) -> None:
        """Send to somebody who is no peer (any more): the message has `_LAST_MS` to leave, and no socket is kept."""
        self.send(address, message)
        self._sockets.pop(address).close(linger=_LAST_MS)

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
        key = _require_key(address, self._key) if _is_tcp(address) else None
        socket = self._context.socket(zmq.PUSH)
        socket.sndhwm = 0  # as in Mailbox: bounded by admitted requests
        socket.linger = 0
        if key is not None:
            _prepare_tcp(socket, address)
            key.identify(socket)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(f"{address!r} is no address to send to: {error}") from error
        self._sockets[address] = socket
        return socket
