"""`flowkv join`: instances on this node for a cluster whose controller is on another."""

import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from flowkv import __version__
from flowkv.auth import KEY_VARIABLE, read_key
from flowkv.cluster.nodes import NODE_SEPARATOR
from flowkv.config import with_overrides
from flowkv.errors import ConfigError, FlowKVError
from flowkv.launch.addresses import check_local, resolve_endpoint, resolve_host, source_address, take_place
from flowkv.launch.display import Display
from flowkv.launch.model import resolve_model
from flowkv.launch.node import Node, running_node
from flowkv.messages import (
    ControllerBeat,
    Dismissed,
    Introduce,
    Join,
    Leave,
    LeaveSoon,
    NodeBeat,
    RestartInstance,
    StopInstance,
    Welcome,
)
from flowkv.types import Role
from flowkv.wire import Mailbox, tcp_address

CARETAKER = "caretaker"
_BEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class JoinOptions:
    controller: str  # HOST[:PORT]
    role: Role
    count: int = 1
    model: str | None = None  # where the model is on this node, if not at the path that the cluster names
    address: str | None = None  # by which the other nodes reach this one
    cluster_key_file: Path | None = None
    timeout_s: float = 10.0  # for the controller to answer, which may start later than this node
    overrides: dict[str, Any] = field(default_factory=dict)  # of the cluster's configuration, for this node


def join(options: JoinOptions, display: Display) -> None:
    """Returns when told to stop by one of STOP_SIGNALS. FlowKVError if this node cannot join, or is dismissed."""
    key = read_key(options.cluster_key_file, os.environ)
    if key is None:
        raise ConfigError(f"joining takes the cluster's key: give it in --cluster-key-file or {KEY_VARIABLE}")
    controller_host, port = resolve_endpoint(options.controller)
    host = resolve_host(options.address) if options.address else source_address(controller_host, port)
    check_local(host)
    with running_node(display, key) as node:
        _Membership(node, options, tcp_address(controller_host, port), host).run()


class _Membership:
    """A node in a cluster: asks to be let in, starts its instances, and stays until either side has enough."""

    def __init__(self, node: Node, options: JoinOptions, controller_address: str, host: str) -> None:
        self._node = node
        self._options = options
        self._controller_address = controller_address
        self._host = host
        self._launcher = secrets.token_hex(8)
        self._place, self._place_name = take_place(controller_address)
        node.stack.callback(self._place.close)
        self._mailbox = Mailbox(node.context, tcp_address(host, "*"), node.key)
        node.stack.callback(self._mailbox.close)
        node.poller.register(self._mailbox.socket, zmq.POLLIN)
        self._welcome: Welcome | None = None
        self._asked_s: float | None = None  # when, if there has been no answer since
        self._beat_due_s = 0.0

    def run(self) -> None:
        node, display = self._node, self._node.display
        display.note(f"asking {self._options.controller} to let this node in")
        node.stack.callback(node.outbox.send, self._controller_address, Leave(self._launcher))
        welcome = self._ask()
        node.stack.callback(node.children.stop_all)
        self._start(welcome)
        while not node.children.are_ready:
            self._turn(welcome)
        names = ", ".join(node.instances.names)
        display.ready(f"joined {self._options.controller} as {welcome.node}: {names}; Ctrl-C leaves it")
        node.signals.lets_drain = True
        while not node.signals.is_drain_asked:
            self._turn(welcome)
        self._drain(welcome)

    def _drain(self, welcome: Welcome) -> None:
        """The controller lets the instances finish what they have, and ends them one by one."""
        node, timeout_s = self._node, welcome.config.server.drain_timeout_s
        node.instances.close()
        node.outbox.send(self._controller_address, LeaveSoon(self._launcher))
        count = len(node.instances.names)
        instances = f"{count} instance{'' if count == 1 else 's'}"
        node.display.note(f"draining: {instances}, at most {timeout_s:g} s; Ctrl-C again stops at once")
        deadline_s = time.monotonic() + timeout_s
        while node.instances.names and time.monotonic() < deadline_s:
            self._turn(welcome)
        node.display.note("stopping")

    def _ask(self) -> Welcome:
        """Until the controller answers, which may start later than this."""
        deadline_s = time.monotonic() + self._options.timeout_s
        while self._welcome is None:
            if time.monotonic() >= deadline_s:
                raise ConfigError(
                    f"no answer from {self._options.controller} within {self._options.timeout_s:g} s: "
                    "no controller listens there or it cannot be reached "
                    f"(nor it this node, at {self._host}), or its cluster key is another"
                )
            self._beat(self._join_message())
            self._wait()
        return self._welcome

    def _start(self, welcome: Welcome) -> None:
        overrides = dict(self._options.overrides)
        if self._options.model is not None:
            overrides["model"] = self._options.model
        config = with_overrides(welcome.config, overrides)
        template = self._node.instance_template(
            config, resolve_model(config), welcome.model_name, self._controller_address, welcome.epoch, self._place
        )
        light = self._node.preload(config)
        self._node.services.start(
            CARETAKER,
            config.restart,
            lambda name, _: self._node.children.start_caretaker(name, light, self._node.folders),
        )
        roles = [self._options.role] * self._options.count
        self._node.instances.start(template, roles, self._host, f"{NODE_SEPARATOR}{welcome.node}")

    def _turn(self, welcome: Welcome) -> None:
        """FlowKVError if the controller is silent, or wants this node no more."""
        self._beat(NodeBeat(self._launcher, self._mailbox.address, welcome.epoch))
        self._wait()
        timeout_s = welcome.config.network.node_timeout_s
        if self._asked_s is not None and time.monotonic() - self._asked_s >= timeout_s:
            raise FlowKVError(f"nothing was heard of the controller for {timeout_s:.0f} s")

    def _beat(self, message: Join | NodeBeat) -> None:
        now_s = time.monotonic()
        if now_s < self._beat_due_s:
            return
        self._beat_due_s = now_s + _BEAT_S
        self._asked_s = now_s if self._asked_s is None else self._asked_s
        self._node.outbox.send(self._controller_address, message)

    def _introduce(self, name: str) -> None:
        """To a controller that was started again, and with what it has not heard."""
        self._node.outbox.send(self._controller_address, self._join_message(name))
        self._node.instances.tell_exits()
        if self._node.signals.is_drain_asked:
            self._node.outbox.send(self._controller_address, LeaveSoon(self._launcher))

    def _join_message(self, name: str = "") -> Join:
        return Join(self._launcher, self._place_name, self._mailbox.address, __version__, name)

    def _wait(self) -> None:
        self._node.wait(max(0.0, self._beat_due_s - time.monotonic()))
        for message in self._mailbox.receive_all():
            match message:
                case Welcome():
                    self._welcome = message
                case ControllerBeat():
                    pass
                case Introduce() if self._welcome is not None:
                    self._introduce(self._welcome.node)
                case StopInstance():
                    self._node.instances.retire(message.instance)
                case RestartInstance():
                    self._node.instances.restart(message.instance, message.hangs)
                case Dismissed():
                    raise FlowKVError(message.reason)
                case _:
                    continue
            self._asked_s = None
