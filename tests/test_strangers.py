"""Nobody without the cluster's key gets a message into a mailbox, whatever he saw on the wire; and all is counted."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest
import zmq

from flowkv import messages as m
from flowkv.auth import ClusterKey
from flowkv.wire import Mailbox, Outbox, SyncContext, encode

KEY, OTHER_KEY = ClusterKey.derive("a" * 32), ClusterKey.derive("b" * 32)
SECRET = "the words of a prompt"


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    context = SyncContext()
    mailbox = Mailbox(context, "tcp://127.0.0.1:*", KEY)
    yield mailbox
    mailbox.close()
    context.term()


@pytest.fixture
def context() -> Iterator[SyncContext]:
    """Of strangers. Whatever a test that fails has left open ends with it."""
    context = SyncContext()
    yield context
    context.destroy(linger=0)


@contextmanager
def sending(key: ClusterKey) -> Iterator[Outbox]:
    context = SyncContext()
    outbox = Outbox(context, key)
    try:
        yield outbox
    finally:
        outbox.close(linger_s=0)
        context.term()


def port_of(address: str) -> int:
    port = urlsplit(address).port
    assert port is not None
    return port


def received(mailbox: Mailbox, number: int = 1) -> list[m.AnyMessage]:
    messages: list[m.AnyMessage] = []
    while len(messages) < number and mailbox.socket.poll(10_000):
        messages += mailbox.receive_all()
    return messages


def turned_away(mailbox: Mailbox) -> m.TurnedAway:
    """What is counted next."""
    waiting = threading.Event()
    while (counted := mailbox.take_turned_away("p0")) is None:
        waiting.wait(0.005)
    return counted


class Tap:
    """Between a sender and a mailbox; keeps what goes by in either direction."""

    def __init__(self, target: int) -> None:
        self.sent, self.answered = bytearray(), bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._target = target
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets = [self._listener]
        self._threads[0].start()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        for one in self._sockets:
            one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._target))
        self._sockets += [client, server]
        for source, sink, kept in ((client, server, self.sent), (server, client, self.answered)):
            self._threads.append(threading.Thread(target=self._pass_on, args=(source, sink, kept)))
            self._threads[-1].start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        try:
            while data := source.recv(65536):
                kept += data
                sink.sendall(data)
        except OSError:
            pass


def say(mailbox: Mailbox, data: bytes) -> None:
    """As a stranger, until the mailbox has hung up."""
    with socket.create_connection(("127.0.0.1", port_of(mailbox.address)), timeout=20) as client:
        with contextlib.suppress(ConnectionError, OSError):  # it may hang up at any byte
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while client.recv(65536):
                pass


def test_what_was_captured_on_the_wire_can_be_neither_read_nor_replayed(mailbox: Mailbox) -> None:
    with closing(Tap(port_of(mailbox.address))) as tap, sending(KEY) as outbox:
        for _ in range(2):
            outbox.send(tap.address, m.Note(SECRET))
        assert received(mailbox, 2) == [m.Note(SECRET)] * 2
    assert len(tap.sent) > 2 * len(SECRET)
    assert SECRET.encode() not in tap.sent + tap.answered
    say(mailbox, bytes(tap.sent))
    assert turned_away(mailbox) == m.TurnedAway("p0", 1, 0)
    assert mailbox.receive_all() == []


def test_frames_that_are_changed_on_their_way_are_no_messages(mailbox: Mailbox) -> None:
    """One bit of every seventh byte of a recorded connection."""
    with closing(Tap(port_of(mailbox.address))) as tap, sending(KEY) as outbox:
        outbox.send(tap.address, m.Note(SECRET))
        assert received(mailbox) == [m.Note(SECRET)]
    positions = range(0, len(tap.sent), 7)
    for position in positions:
        forged = bytearray(tap.sent)
        forged[position] ^= 1
        say(mailbox, bytes(forged))
    counted = 0
    while counted < len(positions):
        counted += turned_away(mailbox).num_connections
    assert counted == len(positions)
    assert mailbox.receive_all() == []


@pytest.mark.parametrize(
    "junk", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 2000, b"\x00" * 2000, encode(m.Note("forged")) * 50]
)
def test_what_speaks_something_else_is_counted(mailbox: Mailbox, junk: bytes) -> None:
    say(mailbox, junk)
    assert turned_away(mailbox) == m.TurnedAway("p0", 1, 0)
    with sending(KEY) as outbox:
        outbox.send(mailbox.address, m.Note("member"))
        assert received(mailbox) == [m.Note("member")]


def shows_nothing(context: SyncContext, address: str) -> zmq.SyncSocket:
    return context.socket(zmq.PUSH)


def shows_another_clusters_key(context: SyncContext, address: str) -> zmq.SyncSocket:
    stranger = context.socket(zmq.PUSH)
    OTHER_KEY.identify(stranger)
    return stranger


def knows_the_public_half(context: SyncContext, address: str) -> zmq.SyncSocket:
    stranger = context.socket(zmq.PUSH)
    stranger.curve_serverkey = KEY.public
    stranger.curve_publickey, stranger.curve_secretkey = OTHER_KEY.public, OTHER_KEY.secret
    return stranger


@pytest.mark.parametrize("stranger", [shows_nothing, shows_another_clusters_key, knows_the_public_half])
def test_strangers_are_counted(
    mailbox: Mailbox, context: SyncContext, stranger: Callable[[SyncContext, str], zmq.SyncSocket]
) -> None:
    knocking = stranger(context, mailbox.address)
    knocking.linger = 0
    knocking.connect(mailbox.address)
    knocking.send(encode(m.Note("stranger")))
    counted = turned_away(mailbox)
    assert counted.num_connections >= 1 and counted.num_messages == 0
    assert mailbox.receive_all() == []
    knocking.close()


def test_what_a_member_sends_and_makes_no_sense_is_counted(
    mailbox: Mailbox, context: SyncContext, caplog: pytest.LogCaptureFixture
) -> None:
    member = context.socket(zmq.PUSH)
    KEY.identify(member)
    member.connect(mailbox.address)
    for _ in range(5):
        member.send(b"\xc1 no message")
    member.send(encode(m.Note("fine")))
    assert received(mailbox) == [m.Note("fine")]
    assert mailbox.take_turned_away("p0") == m.TurnedAway("p0", 0, 5)
    assert mailbox.take_turned_away("p0") is None
    assert len(caplog.records) == 1  # a log is not to be flooded
    member.close(linger=0)
