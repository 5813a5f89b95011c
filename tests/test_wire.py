import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from flowkv import messages as m
from flowkv.auth import ClusterKey
from flowkv.config import ClusterConfig
from flowkv.errors import ConfigError, ProtocolError
from flowkv.types import (
    FinishReason,
    InstanceCounters,
    InstanceLoad,
    InstanceStatus,
    ModelInfo,
    Output,
    ProcessUsage,
    Request,
    Role,
    SamplingParams,
    TokenLogprobs,
)
from flowkv.wire import AsyncMailbox, Mailbox, Outbox, SyncContext, decode, encode, tcp_address
from tests.pools import descriptor

MODEL = ModelInfo(name="toy", dtype="float32", vocab_size=256, max_model_tokens=512)
REQUEST = Request(
    request_id="r0",
    prompt_ids=[1, 2, 3],
    sampling=SamplingParams(max_tokens=4, stop_token_ids=frozenset({7}), logprobs=2),
)
KEY, OTHER_KEY = ClusterKey.derive("a" * 32), ClusterKey.derive("b" * 32)
PEER = m.PeerInfo("p0.1", "ipc:///run/p0", descriptor("p0.1"))
LOGPROBS = TokenLogprobs(5, -0.25, [(5, -0.25), (6, -2.0)])
OUTPUT = Output("r0", 1, 3, [5], FinishReason.STOP, 5, [LOGPROBS], [LOGPROBS], "why")
STATUS = InstanceStatus(
    name="p0.1",
    role=Role.PREFILL,
    num_blocks=64,
    block_size=16,
    load=InstanceLoad(num_waiting=1),
    counters=InstanceCounters(num_steps=2, step_seconds=0.5),
)
EXAMPLES: list[m.AnyMessage] = [
    m.FrontendHello("f0", "ipc:///run/f0"),
    m.FrontendExited("f0", "ipc:///run/f0"),
    m.Submit("f0", REQUEST),
    m.Abort("r0", 2),
    PEER,
    m.Register(PEER, Role.DECODE, MODEL, 16, 256, "0.1", "epoch"),
    m.Registered(),
    m.RegistrationRefused("another model"),
    m.Introduce(),
    m.Renew("p0.1", [1, 3], 5.0),
    m.Renewed("d0.1", 5.0),
    m.StepSample(1, 2, 3, 4, 0.5),
    m.LoadReport(
        "p0.1",
        3,
        Role.MIXED,
        InstanceLoad(),
        InstanceCounters(),
        [m.StepSample(1, 2, 3, 4, 0.5, 2)],
        [("r0", 7)],
        [("r1", "d0.1")],
        ["r2"],
        prefilled=["r3"],
    ),
    m.SetRole(Role.DECODE),
    m.Introduce(),
    m.Lost("r0"),
    m.Drain(),
    m.StartInstance(Role.PREFILL),
    m.StopInstance("p0.1"),
    m.Working("p0.1"),
    m.ServiceBeat("controller"),
    m.DrainCluster(),
    m.LeaveSoon("l0"),
    m.RestartInstances(["p0.1"], "token"),
    m.FlipInstance("p0.1", Role.DECODE),
    m.RestartInstance("p0.1", hangs=True),
    m.InstanceExited("p0.1", "killed"),
    m.Join("l0", "host/0", "tcp://10.0.0.2:4000", "0.1"),
    m.TurnedAway("p0.1", 3, 1),
    m.Usage("p0.1", ProcessUsage(resident_bytes=1 << 20, open_files=12, cpu_seconds=0.5)),
    m.NodeBeat("l0", "tcp://10.0.0.2:4000", "epoch"),
    m.Leave("l0"),
    m.Dispatch(1, REQUEST, "ipc:///run/f0", ["d0.1"]),
    m.PeerUp(PEER),
    m.PeerDown("p0.1"),
    m.Reserve("p0.1", 0, REQUEST, "ipc:///run/f0"),
    m.Reserved("d0.1", "r0", 0, 77, [4, 5]),
    m.Refused("d0.1", "r0", 0),
    m.KvReady("p0.1", "r0", 0, 2, {0: [9], 1: []}),
    m.Release("d0.1", "r0", 0),
    m.Cancel("d0.1", "r0", 0),
    m.CancelAck("p0.1", "r0", 0),
    m.Accepted("r0"),
    m.Rejected("r0", 400, "too long", "context_length_exceeded", "prompt"),
    m.Outputs("d0.1", [OUTPUT, Output("r0", 0, 0, [1])]),
    m.ClusterStatus(True, MODEL, 512, [STATUS]),
    m.Progress("p0", 0.5, "loading"),
    m.Ready("p0"),
    m.Serving("f0"),
    m.StartFailed("p0", "no such folder"),
    m.Note("p0 -> d0  shm"),
    m.Welcome("node-1", "epoch", ClusterConfig(toy=True, model_name="toy"), "toy"),
    m.ControllerBeat("epoch"),
    m.Dismissed("another version"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message: m.AnyMessage) -> None:
    assert decode(encode(message)) == message


def test_no_message_type_is_forgotten() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(m.AnyMessage))


@given(st.binary(max_size=200))
def test_random_bytes_are_a_protocol_error(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(frame)


@given(st.sampled_from(EXAMPLES), st.data())
def test_damaged_frames_decode_or_are_a_protocol_error(message: m.AnyMessage, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for damaged in (bytes(frame), bytes(frame[:cut])):
        try:
            decode(damaged)
        except ProtocolError as error:
            assert str(error).startswith("undecodable")


def test_deep_nesting_is_a_protocol_error() -> None:
    # An entry more than the struct has is skipped, however deep it goes.
    frame = encode(m.Abort("r0")).replace(b"\x93", b"\x94", 1) + b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(ProtocolError):
        decode(frame)


@pytest.fixture
def context() -> "Iterator[zmq.Context[zmq.SyncSocket]]":
    """Whatever a test that fails has left open ends with it."""
    context: SyncContext = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_mailbox_gets_what_outboxes_send_in_order(context: SyncContext, tmp_path: Path) -> None:
    mailbox, outbox = Mailbox(context, f"ipc://{tmp_path}/m"), Outbox(context)
    sent = [m.Abort(f"r{number}") for number in range(2000)]
    for message in sent:
        outbox.send(mailbox.address, message)
    received: list[m.AnyMessage] = []
    while len(received) < len(sent) and mailbox.socket.poll(5000):
        received += mailbox.receive_all()
    assert received == sent
    assert mailbox.receive_all() == []
    outbox.close()
    mailbox.close()
    context.term()


def test_tcp_mailbox_tells_its_port(context: SyncContext) -> None:
    for host in ("127.0.0.1", "::1"):
        mailbox, outbox = Mailbox(context, tcp_address(host, "*"), KEY), Outbox(context, KEY)
        assert mailbox.address.startswith(tcp_address(host, "")) and not mailbox.address.endswith(("*", ":0"))
        outbox.send(mailbox.address, m.Ready("x"))
        assert mailbox.socket.poll(30_000)  # a busy machine takes its time over a handshake
        assert mailbox.receive_all() == [m.Ready("x")]
        outbox.close()
        mailbox.close()
    context.term()


def test_tcp_takes_a_key(context: SyncContext) -> None:
    with pytest.raises(ConfigError, match="key"):
        Mailbox(context, "tcp://127.0.0.1:*")
    with pytest.raises(ConfigError, match="key"):
        Outbox(context).send("tcp://127.0.0.1:9", m.Ready("x"))
    context.term()


def shows_nothing(socket: zmq.SyncSocket) -> None:
    """ZeroMQ's NULL mechanism."""


def shows_a_password(socket: zmq.SyncSocket) -> None:
    socket.plain_username, socket.plain_password = b"flowkv", KEY.secret


def shows_another_key(socket: zmq.SyncSocket) -> None:
    OTHER_KEY.identify(socket)


def knows_the_public_half_only(socket: zmq.SyncSocket) -> None:
    socket.curve_serverkey = KEY.public
    socket.curve_publickey, socket.curve_secretkey = OTHER_KEY.public, OTHER_KEY.secret


STRANGERS: list[Callable[[zmq.SyncSocket], None]] = [
    shows_nothing, shows_a_password, shows_another_key, knows_the_public_half_only
]  # fmt: skip


@pytest.mark.parametrize("stranger", STRANGERS)
def test_nothing_gets_in_without_the_key(
    context: SyncContext, caplog: pytest.LogCaptureFixture, stranger: Callable[[zmq.SyncSocket], None]
) -> None:
    receiving: SyncContext = zmq.Context()
    mailbox, outbox = Mailbox(receiving, "tcp://127.0.0.1:*", KEY), Outbox(context, KEY)
    strangers = [context.socket(zmq.PUSH) for _ in range(3)]
    for socket in strangers:
        socket.linger = 0
        stranger(socket)
        socket.connect(mailbox.address)
        socket.send(encode(m.Ready("stranger")))
    deadline_s = time.monotonic() + 10.0
    while not caplog.records and time.monotonic() < deadline_s:
        time.sleep(0.01)
    outbox.send(mailbox.address, m.Ready("member"))
    received = mailbox.receive_all() if mailbox.socket.poll(5000) else []
    mailbox.close()
    receiving.term()
    for socket in strangers:
        socket.close()
    outbox.close()
    context.term()
    assert received == [m.Ready("member")]
    assert [record.message for record in caplog.records] == [
        "turned away a connection that does not hold the cluster's key"
    ]


def test_members_turn_away_from_whoever_listens_in_their_place(context: SyncContext) -> None:
    impostor = Mailbox(context, "tcp://127.0.0.1:*", OTHER_KEY)
    sending: SyncContext = zmq.Context()
    outbox = Outbox(sending, KEY)
    outbox.send(impostor.address, m.Ready("secret"))
    assert not impostor.socket.poll(300)
    outbox.close(linger_s=0)
    sending.term()
    impostor.close()
    context.term()


def test_bad_frame_is_dropped_and_the_rest_arrives(
    context: SyncContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mailbox = Mailbox(context, f"ipc://{tmp_path}/m")
    socket = context.socket(zmq.PUSH)
    socket.connect(mailbox.address)
    for frame in (b"\xc1", encode(m.Ready("x"))):
        socket.send(frame)
    received: list[m.AnyMessage] = []
    while not received and mailbox.socket.poll(5000):
        received += mailbox.receive_all()
    assert received == [m.Ready("x")]
    assert "undecodable" in caplog.text
    socket.close()
    mailbox.close()
    context.term()


def test_a_peer_that_is_not_there_blocks_nobody(context: SyncContext, tmp_path: Path) -> None:
    outbox = Outbox(context)
    address = f"ipc://{tmp_path}/nobody"
    for _ in range(3000):  # more than ZeroMQ holds by default
        outbox.send(address, m.Ready("x"))
    outbox.drop(address)
    outbox.drop(address)
    outbox.send(address, m.Ready("x"))
    outbox.close(linger_s=0)
    context.term()


def test_last_words_of_a_closing_outbox_arrive(context: SyncContext, tmp_path: Path) -> None:
    receiving: SyncContext = zmq.Context()
    mailbox, outbox = Mailbox(receiving, f"ipc://{tmp_path}/m"), Outbox(context)
    outbox.send(mailbox.address, m.Ready("f0"))
    outbox.close()
    context.term()
    assert mailbox.socket.poll(5000)
    assert mailbox.receive_all() == [m.Ready("f0")]
    mailbox.close()
    receiving.term()


def test_address_that_is_none_too_long_or_taken_is_a_config_error(context: SyncContext, tmp_path: Path) -> None:
    too_long = f"ipc://{tmp_path}/" + "x" * 108
    with pytest.raises(ConfigError, match="107"):
        Mailbox(context, too_long)
    outbox = Outbox(context)
    with pytest.raises(ConfigError, match="107"):
        outbox.send(too_long, m.Ready("x"))
    for nowhere in ("", "nowhere", "tcp:/", "ipc://"):
        with pytest.raises(ConfigError, match="no address"):
            outbox.send(nowhere, m.Ready("x"))
    with pytest.raises(ConfigError, match="cannot listen"):
        Mailbox(context, f"ipc://{tmp_path}/no/such/folder")
    context.term()


def test_async_mailbox(context: SyncContext, tmp_path: Path) -> None:
    async def scenario() -> list[m.AnyMessage]:
        mailbox, outbox = AsyncMailbox(context, f"ipc://{tmp_path}/m"), Outbox(context)
        waiting = asyncio.create_task(mailbox.receive())
        await asyncio.sleep(0)
        received: list[m.AnyMessage] = []
        for number in range(100):
            outbox.send(mailbox.address, m.Abort(f"r{number}"))
        received += await waiting
        while len(received) < 100:
            received += await mailbox.receive()
        mailbox.close()
        outbox.close()
        return received

    assert asyncio.run(scenario()) == [m.Abort(f"r{number}") for number in range(100)]
    context.term()


def test_an_instance_without_room_for_anything_is_no_instance() -> None:
    register = next(message for message in EXAMPLES if isinstance(message, m.Register))
    for field in ("block_size", "max_choices", "max_batch_tokens"):
        with pytest.raises(ProtocolError):
            decode(encode(msgspec.structs.replace(register, **{field: 0})))
