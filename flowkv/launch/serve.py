"""`flowkv serve`: a controller, a frontend and the instances of this node."""

import os
import secrets
from collections import deque
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from flowkv.auth import KEY_VARIABLE, ClusterKey, read_key
from flowkv.cluster.service import ControllerSpec, run_controller
from flowkv.config import ClusterConfig, with_overrides
from flowkv.errors import ConfigError
from flowkv.launch.addresses import check_local, resolve_endpoint
from flowkv.launch.display import Display
from flowkv.launch.model import model_name, resolve_model
from flowkv.launch.node import Node, running_node
from flowkv.messages import FrontendExited
from flowkv.server.process import FrontendSpec, run_frontend
from flowkv.signals import DRAIN_SIGNAL
from flowkv.wire import tcp_address

CONTROLLER, FRONTEND = "controller", "frontend"
_MAX_EXITS = 10  # of frontends, that are told again to a controller that has been started again


def serve(config: ClusterConfig, display: Display) -> None:
    """Returns when told to stop by one of STOP_SIGNALS. FlowKVError if the cluster cannot start, or has broken down."""
    folder = resolve_model(config)
    endpoint, key = _listen_endpoint(config)
    with running_node(display, key) as node:
        _Cluster(node, config, folder, endpoint).run()


def _listen_endpoint(config: ClusterConfig) -> tuple[tuple[str, int] | None, ClusterKey | None]:
    """Where other nodes may join and what they must know; nothing, if they may not."""
    network = config.network
    if network.listen is None:
        return None, None
    host, port = resolve_endpoint(network.listen)
    check_local(host)
    key = read_key(None if network.cluster_key_file is None else Path(network.cluster_key_file), os.environ)
    if key is None:
        raise ConfigError(
            "--listen needs a key that all nodes share: make one with flowkv key, and give it in "
            f"--cluster-key-file or {KEY_VARIABLE}"
        )
    return (host, port), key


class _Cluster:
    def __init__(
        self, node: Node, config: ClusterConfig, folder: Path | None, endpoint: tuple[str, int] | None
    ) -> None:
        self._node = node
        self._config = config
        self._folder = folder
        self._model_name = model_name(config, folder)
        self._host = None if endpoint is None else endpoint[0]
        self._controller_address = node.ipc_address(CONTROLLER) if endpoint is None else tcp_address(*endpoint)
        self._epoch = secrets.token_hex(8)
        self._frontend_exits: deque[FrontendExited] = deque(maxlen=_MAX_EXITS)

    def run(self) -> None:
        self._node.stack.callback(self._stop)
        self._start()
        while not self._is_serving:
            self._node.wait()
        self._node.display.ready(self._description())
        self._node.signals.lets_drain = True
        while not self._node.signals.is_drain_asked:
            self._node.wait()
        self._drain()

    def _drain(self) -> None:
        """The frontend ends with its last request, or when it has waited long enough."""
        services, name = self._node.services, self._node.services.present_name(FRONTEND)
        services.retire(FRONTEND)
        if (frontend := self._node.children.get(name)) is not None and frontend.is_ready:
            self._node.children.stop(name, DRAIN_SIGNAL, self._config.server.drain_timeout_s)
            while services.is_running(FRONTEND):
                self._node.wait()
        self._node.display.note("stopping")

    def _stop(self) -> None:
        """The frontend first, so that clients hear of it."""
        self._node.children.stop_all(self._node.services.present_name(FRONTEND))

    @property
    def _is_serving(self) -> bool:
        """Nothing is turned away any more, unless every instance is still to come from other nodes."""
        return self._node.children.are_ready and (self._node.is_serving or not self._config.roles)

    def _start(self) -> None:
        """The frontend binds its port before the instances start, so that a busy one is known before a model loads."""
        light = self._node.preload(self._config)
        services, restart = self._node.services, self._config.restart
        services.start(
            CONTROLLER, restart, lambda *which: self._start_controller(light, *which), self._on_controller_exit
        )
        services.start(FRONTEND, restart, lambda *which: self._start_frontend(light, *which), self._on_frontend_exit)
        while not self._node.children.are_ready:
            self._node.wait()
        template = self._node.instance_template(
            self._config, self._folder, self._model_name, self._controller_address, self._epoch
        )
        scheduling = self._config.scheduling
        self._node.instances.start(
            template, self._config.roles, self._host, max_instances=scheduling.max_instances
        )  # fmt: skip

    # Either removes the folders if the launcher is killed: the other may be about to be started again.

    def _start_controller(self, context: Any, name: str, generation: int) -> None:
        """One that is started again has heard nothing of those that have ended."""
        spec = self._controller_spec(name, generation)
        self._node.children.start(name, context, run_controller, spec, orphaned_folders=self._node.folders)
        if generation:
            self._node.instances.tell_exits()
            for exited in self._frontend_exits:
                self._node.outbox.send(self._controller_address, exited)

    def _start_frontend(self, context: Any, name: str, _: int) -> None:
        spec = self._frontend_spec(name)
        self._node.children.start(name, context, run_frontend, spec, orphaned_folders=self._node.folders)

    def _on_controller_exit(self, _: str) -> None:
        self._node.outbox.drop(self._controller_address)  # what is sent into a connection that has ended is lost

    def _on_frontend_exit(self, name: str) -> None:
        exited = FrontendExited(name)
        self._frontend_exits.append(exited)
        self._node.outbox.send(self._controller_address, exited)

    def _controller_spec(self, name: str, generation: int) -> ControllerSpec:
        """Other nodes look for the model at the same path, unless they are told another."""
        config = self._config
        if config.model is not None:
            config = with_overrides(config, {"model": str(self._folder)})
        return ControllerSpec(
            name=name,
            address=self._controller_address,
            launcher_address=self._node.address,
            epoch=self._epoch,
            config=config,
            model_name=self._model_name,
            key=self._node.key,
            generation=generation,
            running=tuple(self._node.instances.ready_names),
            running_addresses=tuple(self._node.instances.ready_addresses),
        )

    def _frontend_spec(self, name: str) -> FrontendSpec:
        """One that is started again listens where the first one did, also where that took any free port."""
        server = self._config.server
        if self._node.url:
            server = msgspec.structs.replace(server, port=urlsplit(self._node.url).port)
        return FrontendSpec(
            name=name,
            address=self._node.mailbox_address(name, self._host),
            controller_address=self._controller_address,
            launcher_address=self._node.address,
            server=server,
            model_folder=None if self._folder is None else str(self._folder),
            model_name=self._model_name,
            key=self._node.key,
            limits=self._config.limits,
            tracing=self._config.tracing,
        )

    def _description(self) -> str:
        roles = self._config.roles
        counts = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles)) or "no instance here"
        where = "" if self._host is None else f", and {self._controller_address.removeprefix('tcp://')} for nodes"
        return f"serving at {self._node.url} ({counts}){where}; Ctrl-C stops it"
