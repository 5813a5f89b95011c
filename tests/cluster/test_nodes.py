from flowkv import __version__
from flowkv.cluster.nodes import Nodes
from flowkv.config import ClusterConfig
from flowkv.messages import (
    ControllerBeat,
    Dismissed,
    InstanceExited,
    Introduce,
    Join,
    Leave,
    Message,
    NodeBeat,
    PeerInfo,
    Register,
    Welcome,
)
from flowkv.types import ModelInfo, Role
from tests.pools import descriptor

CONFIG = ClusterConfig(toy=True)
TIMEOUT_S = CONFIG.network.node_timeout_s
MODEL = ModelInfo(name="toy", dtype="toy", vocab_size=256, max_model_tokens=512)


def registration(instance: str) -> Register:
    peer = PeerInfo(instance, instance, descriptor(instance))
    return Register(peer, Role.DECODE, MODEL, 16, 8, __version__, "epoch")


class Rig:
    def __init__(self, generation: int = 0) -> None:
        self.nodes = Nodes("epoch", CONFIG, "toy", generation)
        self.now_s = 0.0

    def take(self, message: Join | NodeBeat | Leave) -> list[tuple[str, Message]]:
        self.nodes.handle(message, self.now_s)
        return self.nodes.take_messages()

    def join(self, launcher: str, place: str | None = None, version: str = __version__, node: str = "") -> Message:
        place = place or f"place of {launcher}"
        [(address, answer)] = self.take(Join(launcher, place, f"tcp://{launcher}", version, node))
        assert address == f"tcp://{launcher}"
        return answer

    def beat(self, launcher: str, epoch: str = "epoch") -> Message:
        [(address, answer)] = self.take(NodeBeat(launcher, f"tcp://{launcher}", epoch))
        assert address == f"tcp://{launcher}"
        return answer

    def register(self, instance: str) -> str | None:
        return self.nodes.refusal(registration(instance))

    def wait(self, seconds: float) -> list[str]:
        self.now_s += seconds
        self.nodes.tick(self.now_s)
        return self.nodes.take_notes()


def test_an_instance_is_stopped_by_the_launcher_of_its_node() -> None:
    rig = Rig()
    rig.join("l1")
    assert rig.register("decode-0@node-1") is None
    assert rig.register("decode-0") is None
    assert rig.nodes.launcher_address("decode-0@node-1") == "tcp://l1"
    assert rig.nodes.launcher_address("decode-0") is None
    rig.take(Leave("l1"))
    assert rig.nodes.launcher_address("decode-0@node-1") is None


def test_a_node_is_welcomed_with_a_name_of_its_own_however_often_it_asks() -> None:
    rig = Rig()
    assert rig.join("l1") == Welcome("node-1", "epoch", CONFIG, "toy")
    assert rig.join("l2") == Welcome("node-2", "epoch", CONFIG, "toy")
    assert rig.join("l1") == Welcome("node-1", "epoch", CONFIG, "toy")
    assert rig.nodes.take_notes() == ["node-1 (tcp://l1) has joined", "node-2 (tcp://l2) has joined"]


def test_another_version_is_dismissed_with_its_reason() -> None:
    assert Rig().join("l1", version="9.9") == Dismissed(f"this node runs FlowKV 9.9, the cluster {__version__}")


def test_beats_are_answered_and_those_of_strangers_dismissed() -> None:
    rig = Rig()
    rig.join("l1")
    assert rig.beat("l1") == ControllerBeat("epoch")
    assert rig.beat("l2") == Dismissed("the cluster does not know this node any more")
    assert rig.beat("l1", epoch="earlier") == Dismissed("the cluster was started again")


def test_silence_is_noted_once_and_so_is_its_end() -> None:
    rig = Rig()
    rig.join("l1")
    rig.nodes.take_notes()
    assert rig.wait(TIMEOUT_S - 0.1) == []
    assert rig.wait(0.1) == ["node-1 (tcp://l1) is silent"]
    assert rig.wait(TIMEOUT_S) == []
    rig.beat("l1")
    assert rig.wait(0.0) == ["node-1 (tcp://l1) is back"]
    assert rig.nodes.take_exits() == []  # a silent node may live


def test_another_launcher_in_its_place_proves_that_a_node_is_dead() -> None:
    rig = Rig()
    rig.join("l1", "place")
    for name in ("decode-0@node-1", "decode-1@node-1", "decode-1@node-1~1"):
        assert rig.register(name) is None
    rig.nodes.on_exited("decode-1@node-1")
    rig.join("l2", "another place")
    assert rig.nodes.take_exits() == []
    assert rig.join("l3", "place") == Welcome("node-3", "epoch", CONFIG, "toy")
    dead = "its launcher is dead"
    assert rig.nodes.take_exits() == [
        InstanceExited("decode-0@node-1", dead, is_final=True),
        InstanceExited("decode-1@node-1~1", dead, is_final=True),
    ]  # fmt: skip
    assert rig.nodes.gone_addresses == ["tcp://l1"]


def test_a_node_that_leaves_takes_its_instances_along_and_its_late_messages_meet_nobody() -> None:
    rig = Rig()
    rig.join("l1")
    rig.register("decode-0@node-1")
    assert rig.take(Leave("l1")) == []
    assert rig.nodes.take_exits() == [InstanceExited("decode-0@node-1", "its node has left the cluster", is_final=True)]
    assert rig.register("decode-1@node-1") == "its node node-1 is not part of this cluster"
    assert isinstance(rig.beat("l1"), Dismissed)
    assert rig.take(Leave("l1")) == []
    assert rig.nodes.take_exits() == []


def test_instances_of_the_controllers_own_node_are_none_of_its_business() -> None:
    rig = Rig()
    assert rig.register("decode-0~1") is None
    assert rig.register("decode-0@node-7") == "its node node-7 is not part of this cluster"


def test_the_end_of_the_cluster_is_told_to_all() -> None:
    rig = Rig()
    rig.join("l1")
    rig.join("l2")
    rig.nodes.dismiss_all("the end")
    assert rig.nodes.take_messages() == [("tcp://l1", Dismissed("the end")), ("tcp://l2", Dismissed("the end"))]


def test_a_controller_that_was_started_again_lets_nodes_introduce_themselves_and_keep_their_names() -> None:
    rig = Rig(generation=1)
    assert rig.beat("l2") == Introduce()
    assert rig.join("l2", node="node-2") == Welcome("node-2", "epoch", CONFIG, "toy")
    assert rig.nodes.take_notes() == [], "nobody has come"
    assert rig.beat("l2") == ControllerBeat("epoch")
    assert rig.register("decode-0@node-2") is None
    assert rig.beat("l1", epoch="earlier") == Dismissed("the cluster was started again")


def test_no_name_is_given_twice_by_controllers_of_one_cluster() -> None:
    first, second, third = Rig(), Rig(generation=1), Rig(generation=2)
    second.join("l1", node="node-1")
    names = [rig.join(f"l{i}") for i, rig in enumerate((first, first, second, second, third, third), start=11)]
    assert [name.node for name in names if isinstance(name, Welcome)] == [
        "node-1", "node-2", "node-1.1", "node-1.2", "node-2.1", "node-2.2"
    ]  # fmt: skip


def test_an_instance_is_waited_for_until_its_node_has_introduced_itself() -> None:
    rig = Rig(generation=1)
    assert rig.nodes.is_awaited(registration("decode-0@node-1"))
    assert not rig.nodes.is_awaited(registration("decode-0"))
    rig.join("l1", node="node-1")
    assert not rig.nodes.is_awaited(registration("decode-0@node-1"))
    assert rig.register("decode-0@node-1") is None
    rig.take(Leave("l1"))
    assert not rig.nodes.is_awaited(registration("decode-0@node-1"))
    assert rig.register("decode-0@node-1") == "its node node-1 is not part of this cluster"


def test_a_name_is_kept_by_one_node_only_and_not_after_it_has_left() -> None:
    rig = Rig(generation=1)
    rig.join("l1", node="node-1")
    unknown = Dismissed("the cluster does not know this node any more")
    assert rig.join("l2", node="node-1") == unknown
    rig.take(Leave("l1"))
    assert rig.join("l1", node="node-1") == unknown


def test_only_a_controller_that_had_predecessors_waits_for_anybody() -> None:
    assert not Rig().nodes.is_awaited(registration("decode-0@node-1"))
