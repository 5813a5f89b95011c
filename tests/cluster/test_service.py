"""The controller's process, less the process: who is let in first, and what comes of an earlier cluster."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowkv import __version__
from flowkv.cluster.service import ControllerSpec, _Service
from flowkv.config import ClusterConfig
from flowkv.messages import (
    Dismissed,
    InstanceExited,
    Introduce,
    Join,
    Message,
    PeerInfo,
    PeerUp,
    Register,
    Registered,
    RegistrationRefused,
    Welcome,
)
from flowkv.types import ModelInfo, PoolDescriptor, Role
from flowkv.wire import Mailbox, Outbox, SyncContext

MODEL = ModelInfo(name="m", dtype="float32", vocab_size=10, max_model_tokens=100, fingerprint="right")


class Rig:
    def __init__(self, folder: Path, **spec_fields: Any) -> None:
        self._folder = folder
        self.context = SyncContext()
        self.outbox = Outbox(self.context)
        self.mailboxes = {name: Mailbox(self.context, self.address(name)) for name in ("launcher", "own", "other")}
        config = ClusterConfig(toy=True)
        spec = ControllerSpec(
            "controller", self.address("c"), self.address("launcher"), "epoch", config, "m", None, **spec_fields
        )  # fmt: skip
        self._inbox = Mailbox(self.context, spec.address)
        self.answers = Outbox(self.context)
        self.service = _Service(spec, self._inbox, self.answers)

    def address(self, name: str) -> str:
        return f"ipc://{self._folder}/{name}"

    def tell(self, message: Message) -> None:
        self.outbox.send(self.address("c"), message)
        self.service.turn()

    def register(self, instance: str, mailbox: str, fingerprint: str = "right") -> None:
        pool = PoolDescriptor(
            node="n", layout_fingerprint="L", num_blocks=8, block_bytes=64, endpoints={"shm": b"/s"}
        )  # fmt: skip
        peer = PeerInfo(instance, self.address(mailbox), pool)
        model = msgspec.structs.replace(MODEL, fingerprint=fingerprint)
        self.tell(Register(peer, Role.DECODE, model, 16, 8, __version__, "epoch"))

    def heard(self, name: str) -> list[Message]:
        """All that has come, at least one message."""
        assert self.mailboxes[name].socket.poll(5000), f"{name} hears nothing"
        return list(self.mailboxes[name].receive_all())

    def close(self) -> None:
        self.answers.close(0.0)
        self.outbox.close(0.0)
        for mailbox in [*self.mailboxes.values(), self._inbox]:
            mailbox.close()
        self.context.term()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_what_is_served_is_said_by_the_controllers_own_node_not_by_the_quickest(rig: Rig) -> None:
    rig.tell(Join("launcher-1", "place", rig.address("other"), __version__))
    assert [type(message) for message in rig.heard("other")] == [Welcome]
    rig.register("decode-0@node-1", "other", fingerprint="wrong")
    rig.register("decode-0", "own")
    assert rig.heard("own") == [Registered()]
    [refused] = rig.heard("other")
    assert isinstance(refused, RegistrationRefused) and "other weights" in refused.reason


def test_the_end_of_an_instance_of_an_earlier_cluster_is_not_that_of_its_namesake(rig: Rig) -> None:
    rig.register("decode-0", "own")
    assert rig.heard("own") == [Registered()]
    rig.tell(InstanceExited("decode-0", "killed", "an earlier epoch"))
    rig.register("decode-1", "other")
    assert any(isinstance(m, PeerUp) and m.peer.instance == "decode-1" for m in rig.heard("own"))


def test_a_successor_asks_those_that_run_who_they_are(tmp_path: Path) -> None:
    rig = Rig(tmp_path, generation=1, running=("decode-0",), running_addresses=(f"ipc://{tmp_path}/own",))
    assert rig.heard("own") == [Introduce()]
    rig.close()


def test_those_who_are_turned_away_cost_no_socket(rig: Rig) -> None:
    for i in range(20):
        rig.tell(Join(f"launcher-{i}", f"place-{i}", rig.address("other"), "another version"))
        [dismissed] = rig.heard("other")
        assert isinstance(dismissed, Dismissed)
    assert rig.address("other") not in rig.answers.addresses
