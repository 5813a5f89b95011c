"""The instances of a node, whose processes are played by the test."""

import itertools
import re
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flowkv.config import ClusterConfig
from flowkv.engine.process import InstanceSpec
from flowkv.errors import ConfigError, FlowKVError
from flowkv.launch.children import Child, Children, NotStarted
from flowkv.launch.instances import Instances
from flowkv.launch.timers import Timers
from flowkv.messages import InstanceExited, Message, StartFailed
from flowkv.types import Role
from flowkv.wire import Outbox


class Rig:
    """Two instances that are in service. Also the display, the children and the outbox of their node."""

    def __init__(self, folder: Path) -> None:
        self.notes: list[str] = []
        self.told: list[Message] = []
        self.stopped: list[str] = []
        self.killed: list[str] = []
        self.running: dict[str, Any] = {}
        self.num_no_room = 0  # so many starts fail
        self.timers = Timers()
        self.instances = Instances(
            cast(Children, self), self, cast(Outbox, self), self.timers, folder, get_context("forkserver")
        )
        template = InstanceSpec(
            name="", role=Role.MIXED, config=ClusterConfig(toy=True), model_folder=None, model_name="toy", threads=0,
            address="", pool_address="", controller_address="controller", launcher_address="launcher", epoch="epoch",
        )  # fmt: skip
        self.instances.start(template, [Role.PREFILL, Role.DECODE], None)
        for name in list(self.running):
            self.ready(name)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, *_: object) -> None: ...

    def send(self, _: str, message: Message) -> None:
        self.told.append(message)

    def start(self, name: str, *_: object) -> None:
        if self.num_no_room:
            self.num_no_room -= 1
            raise NotStarted("could not be started: no room")
        self.running[name] = SimpleNamespace(name=name, is_ready=False)

    def get(self, name: str) -> Any:
        return self.running.get(name)

    def stop(self, name: str) -> None:
        self.stopped.append(name)

    def kill(self, name: str) -> None:
        self.killed.append(name)

    def ready(self, name: str) -> None:
        self.running[name].is_ready = True
        self.instances.on_ready(name)

    def end(self, name: str, how: str = "exited with code 0") -> None:
        self.instances.on_exit(cast(Child, self.running.pop(name)), how)
        self.timers.run_due(float("inf"))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_one_that_is_to_be_restarted_is_ended_in_order_and_followed_at_once_however_often(rig: Rig) -> None:
    names = ["decode-0", *(f"decode-0~{i}" for i in range(1, 12))]
    for name, successor in itertools.pairwise(names):
        rig.instances.restart(name, hangs=False)
        rig.end(name)
        rig.ready(successor)
    assert (rig.stopped, rig.killed) == (names[:-1], [])
    assert rig.notes[0] == "decode-0 was drained; starting it again"


def test_one_that_hangs_is_killed_which_is_a_failure_like_others(rig: Rig) -> None:
    rig.instances.restart("decode-0", hangs=True)
    assert (rig.stopped, rig.killed) == ([], ["decode-0"])
    rig.end("decode-0", "was killed by SIGKILL")
    assert rig.notes == ["decode-0 said nothing for too long; starting it again"]
    rig.ready("decode-0~1")
    rig.end("decode-0~1", "was killed by SIGKILL")
    assert re.search("starting it again in 1 s .failure 2 of at most 8", rig.notes[-1])


def test_a_restart_of_one_that_has_ended_is_nothing(rig: Rig) -> None:
    rig.instances.restart("decode-9", hangs=True)
    assert rig.killed == []


def test_work_makes_a_death_no_failure(rig: Rig) -> None:
    name = "decode-0"
    for i in range(20):
        rig.instances.on_working(name)
        rig.end(name, "was killed by SIGKILL")
        name = f"decode-0~{i + 1}"
        rig.ready(name)
    assert set(rig.running) == {"prefill-0", "decode-0~20"}


def test_when_a_node_closes_nobody_is_followed_and_who_is_not_in_service_yet_ends(rig: Rig) -> None:
    rig.end("decode-0")
    rig.instances.close()
    assert rig.stopped == ["decode-0~1"]
    rig.end("decode-0~1")
    rig.end("prefill-0")
    assert rig.instances.names == []


def test_one_that_waits_to_be_started_again_is_not_when_its_node_closes_meanwhile(rig: Rig) -> None:
    rig.instances.on_exit(cast(Child, rig.running.pop("decode-0")), "was killed by SIGKILL")
    rig.instances.close()
    rig.timers.run_due(float("inf"))
    assert set(rig.running) == {"prefill-0"}


def test_ends_are_told_again_the_latest_of_them(rig: Rig) -> None:
    name = "decode-0"
    for i in range(150):
        rig.instances.on_working(name)
        rig.end(name)
        name = f"decode-0~{i + 1}"
    rig.told.clear()
    rig.instances.tell_exits()
    again = [message.instance for message in rig.told if isinstance(message, InstanceExited)]
    assert again == [f"decode-0~{i}" for i in range(50, 150)]


def test_the_first_ones_must_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.running["prefill-0"].is_ready = False
    with pytest.raises(FlowKVError, match="prefill-0 exited with code 0 before it was ready"):
        rig.end("prefill-0")


def test_a_successor_that_the_machine_has_no_room_for_is_a_failure_and_is_tried_again(rig: Rig) -> None:
    rig.num_no_room = 2
    rig.end("decode-0", "was killed by SIGKILL")
    assert set(rig.running) == {"prefill-0"} and rig.instances.names == ["prefill-0"]
    assert re.search("decode-0~1 could not be started: no room; starting it again in 1 s .failure 2 of", rig.notes[-1])
    rig.timers.run_due(float("inf"))
    rig.timers.run_due(float("inf"))
    assert set(rig.running) == {"prefill-0", "decode-0~3"}
    ended = [message.instance for message in rig.told if isinstance(message, InstanceExited)]
    assert ended == ["decode-0", "decode-0~1", "decode-0~2"]


def test_one_more_that_there_is_no_room_for_is_not_added(rig: Rig) -> None:
    rig.num_no_room = 1
    rig.instances.add(Role.DECODE)
    assert rig.notes == ["decode-1 could not be added: could not be started: no room"]
    assert [message.instance for message in rig.told if isinstance(message, InstanceExited)] == ["decode-1"]


def test_what_one_that_is_gone_says_of_its_start_ends_nobody(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.instances.on_start_failed(StartFailed("decode-7", "why"))
    assert "decode-7: why" in caplog.text
    rig.instances.on_start_failed(StartFailed("decode-0", "why"))  # it was ready once
    assert rig.stopped == ["decode-0"]
    rig.running["prefill-0"].is_ready = False
    with pytest.raises(ConfigError, match="prefill-0: why"):
        rig.instances.on_start_failed(StartFailed("prefill-0", "why"))
