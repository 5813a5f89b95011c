"""The other nodes of the cluster: who has joined, who is silent, and whose instances are known to be dead."""

from dataclasses import dataclass, field

from flowkv import __version__
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
    Register,
    Welcome,
    seat_of,
)

NODE_SEPARATOR = "@"  # instance@node; the controller's own node has no name
_MANY_BEATS_S = 3.0  # a launcher beats every second
_UNKNOWN = "the cluster does not know this node any more"


@dataclass(slots=True)
class _Node:
    name: str
    place: str
    address: str
    heard_s: float
    is_silent: bool = False
    is_leaving: bool = False  # it has said so, and finishes what it has
    instances: set[str] = field(default_factory=set)  # that have registered and are not known to be dead


class Nodes:
    """Messages in by `handle`; out come messages as (address, message) pairs, the ends of instances, and notes.

    A silent node is only marked: it may be back. Its instances are dead when their launcher says so, or when another
    launcher holds its place.
    """

    def __init__(self, epoch: str, config: ClusterConfig, model_name: str, generation: int = 0) -> None:
        """`generation` is how many controllers the cluster had before, whose nodes may still be there."""
        self._epoch = epoch
        self._generation = generation
        self._config = config
        self._model_name = model_name
        self._nodes: dict[str, _Node] = {}  # by launcher
        self._gone: set[str] = set()  # names of those that have left, or are dead
        self._num_joined = 0
        self._out: list[tuple[str, Message]] = []
        self._exits: list[InstanceExited] = []
        self._notes: list[str] = []
        self.gone_addresses: list[str] = []  # as in Controller

    # --- in and out ------------------------------------------------------------------------------------------------

    def handle(self, message: Join | NodeBeat | Leave, now_s: float) -> None:
        match message:
            case Join():
                self._on_join(message, now_s)
            case NodeBeat():
                self._on_beat(message, now_s)
            case Leave() if message.launcher in self._nodes:
                self._remove(message.launcher, "its node has left the cluster")
            case Leave():
                pass

    def refusal(self, message: Register) -> str | None:
        """Why an instance cannot be taken: its node is not there, or has gone before this came."""
        if (name := node_name(message.peer.instance)) is None:
            return None
        if (node := self._named(name)) is None:
            return f"its node {name} is not part of this cluster"
        node.instances.add(message.peer.instance)
        return None

    def is_awaited(self, message: Register) -> bool:
        """Whether its node may only not have introduced itself yet to this controller, which is not the first."""
        name = node_name(message.peer.instance)
        return name is not None and self._named(name) is None and name not in self._gone and self._generation > 0

    def launcher_address(self, instance: str) -> str | None:
        """Of the node that runs it; None if that is the controller's own, or has gone."""
        return next((node.address for node in self._nodes.values() if instance in node.instances), None)

    def leave_soon(self, launcher: str) -> list[str]:
        """Its node will go: the instances there that are not known to be dead."""
        if (node := self._nodes.get(launcher)) is None:
            return []
        node.is_leaving = True
        return sorted(node.instances)

    def is_leaving(self, instance: str) -> bool:
        """Whether its node will go."""
        return any(node.is_leaving and instance in node.instances for node in self._nodes.values())

    def is_cut_off(self, instance: str, now_s: float) -> bool:
        """Whether nothing was heard lately of the launcher that runs it either."""
        node = next((node for node in self._nodes.values() if instance in node.instances), None)
        return node is not None and now_s - node.heard_s >= _MANY_BEATS_S

    def on_exited(self, instance: str) -> None:
        for node in self._nodes.values():
            node.instances.discard(instance)

    def tick(self, now_s: float) -> None:
        """Called often, when all messages are handled."""
        for node in self._nodes.values():
            if not node.is_silent and now_s - node.heard_s >= self._config.network.node_timeout_s:
                node.is_silent = True
                self._notes.append(f"{node.name} ({node.address}) is silent")

    def dismiss_all(self, reason: str) -> None:
        for node in self._nodes.values():
            self._send(node.address, Dismissed(reason))

    def take_messages(self) -> list[tuple[str, Message]]:
        messages, self._out = self._out, []
        return messages

    def take_exits(self) -> list[InstanceExited]:
        """What is known by now to be dead, without having been reported."""
        exits, self._exits = self._exits, []
        return exits

    def take_notes(self) -> list[str]:
        notes, self._notes = self._notes, []
        return notes

    # --- inside ----------------------------------------------------------------------------------------------------

    def _on_join(self, message: Join, now_s: float) -> None:
        if message.version != __version__:
            reason = f"this node runs FlowKV {message.version}, the cluster {__version__}"
            self._send(message.address, Dismissed(reason))
            return
        if message.launcher not in self._nodes:
            if message.node in self._gone or self._named(message.node) is not None:
                self._send(message.address, Dismissed(_UNKNOWN))
                return
            self._add(message, now_s)
        name = self._nodes[message.launcher].name
        self._send(message.address, Welcome(name, self._epoch, self._config, self._model_name))

    def _add(self, message: Join, now_s: float) -> None:
        for launcher in [launcher for launcher, node in self._nodes.items() if node.place == message.place]:
            self._remove(launcher, "its launcher is dead")
        node = _Node(message.node or self._new_name(), message.place, message.address, now_s)
        self._nodes[message.launcher] = node
        if not message.node:
            self._notes.append(f"{node.name} ({node.address}) has joined")

    def _new_name(self) -> str:
        """No other controller of this cluster gives it to a node."""
        self._num_joined += 1
        number = f"{self._num_joined}" if self._generation == 0 else f"{self._generation}.{self._num_joined}"
        return f"node-{number}"

    def _named(self, name: str) -> _Node | None:
        return next((node for node in self._nodes.values() if node.name == name), None)

    def _remove(self, launcher: str, reason: str) -> None:
        node = self._nodes.pop(launcher)
        self._gone.add(node.name)
        self._exits.extend(InstanceExited(instance, reason, is_final=True) for instance in sorted(node.instances))
        self._notes.append(f"{node.name} ({node.address}) is gone")
        self.gone_addresses.append(node.address)

    def _on_beat(self, message: NodeBeat, now_s: float) -> None:
        if message.epoch != self._epoch:
            self._send(message.address, Dismissed("the cluster was started again"))
        elif (node := self._nodes.get(message.launcher)) is None:
            self._send(message.address, Introduce() if self._generation else Dismissed(_UNKNOWN))
        else:
            if node.is_silent:
                self._notes.append(f"{node.name} ({node.address}) is back")
            node.is_silent = False
            node.heard_s = now_s
            self._send(node.address, ControllerBeat(self._epoch))

    def _send(self, address: str, message: Message) -> None:
        self._out.append((address, message))


def node_name(instance: str) -> str | None:
    """Of `decode-0@node-1~2`: `node-1`. None: it was started by the controller's own node."""
    _, separator, node = instance.partition(NODE_SEPARATOR)
    return seat_of(node) if separator else None
