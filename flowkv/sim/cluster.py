"""A cluster on a virtual clock: the real `Controller`, the real `Engine` of every instance, and what is between."""

from collections.abc import Callable, Sequence

from flowkv import __version__
from flowkv.cluster.controller import Controller
from flowkv.config import ClusterConfig, RestartConfig
from flowkv.engine.effects import Write
from flowkv.messages import (
    FrontendHello,
    InstanceExited,
    Message,
    Outputs,
    PeerInfo,
    Register,
    Registered,
    RegistrationRefused,
    Reserved,
    StartInstance,
    StopInstance,
)
from flowkv.sim.chrome import Recorder
from flowkv.sim.costs import CostModel
from flowkv.sim.instance import Noise, SimInstance
from flowkv.sim.links import LinkModel
from flowkv.sim.loop import Loop
from flowkv.sim.world import BACKEND, CONTROLLER, FRONTEND, LAUNCHER
from flowkv.transfer.base import Arrived, Written
from flowkv.types import ModelInfo, PoolDescriptor, Role

_CONTROLLER_BEAT_S = 0.25
_EPOCH = "simulated"


class SimCluster:
    """Everything between the frontend, which is the caller's, and virtual hardware.

    `to_frontend` gets messages of the controller, `put_out` tokens with their times. `costs` has a model for each
    instance of `config`; one that is added runs on the first of its role's.
    """

    def __init__(
        self,
        config: ClusterConfig,
        costs: Sequence[CostModel],
        seed: int,
        coalesce: bool,
        to_frontend: Callable[[Message], None],
        put_out: Callable[[Outputs, Sequence[float]], None],
        recorder: Recorder | None = None,
    ) -> None:
        self.loop = Loop()
        self.put_out = put_out
        self.recorder = recorder
        self.instances: dict[str, SimInstance] = {}
        self.num_started = 0
        self._config = config
        self._costs = costs
        self._seed = seed
        self._coalesce = coalesce
        self._to_frontend = to_frontend
        self._links = LinkModel(config.simulate.link_bytes_per_s, config.simulate.call_s)
        self.controller = Controller(
            len(config.roles), _EPOCH, BACKEND,
            slo=config.slo, scheduling=config.scheduling, launcher_address=LAUNCHER,
            restart=RestartConfig(hung=False),  # a step may be as long as it likes
        )  # fmt: skip
        self.send(FRONTEND, CONTROLLER, FrontendHello(FRONTEND, FRONTEND))
        for role, cost in zip(config.roles, costs, strict=True):
            self._add(role, cost)
        self.loop.after(_CONTROLLER_BEAT_S, self._beat)

    # --- messages and bytes ----------------------------------------------------------------------------------------

    def send(self, sender: str, address: str, message: Message) -> None:
        """It is there `message_s` later, behind what the same sender has sent before."""
        delay_s = self._config.simulate.message_s
        if self.recorder is not None and isinstance(message, Reserved):
            self.recorder.reserved(int(message.request_id), message.instance, message.immediate)
        if address == CONTROLLER:
            self.loop.after(delay_s, self._tell_controller, message)
        elif address == FRONTEND:
            self.loop.after(delay_s, self._to_frontend, message)
        elif address == LAUNCHER:
            self.loop.after(delay_s, self._tell_launcher, message)
        elif (instance := self.instances.get(address)) is not None and not isinstance(message, Registered):
            self.loop.after(delay_s, instance.receive, message)

    def write(self, source: str, write: Write) -> None:
        now_s = self.loop.now_s
        instance, target = self.instances[source], self.instances.get(write.peer)
        if target is None:
            self.loop.at(now_s, instance.receive, Written(write.ticket, 0, 0.0, now_s))
            return
        block_bytes = instance.cost.block_bytes(self._config.engine.block_size)
        num_blocks = sum(run.num_blocks for run in write.runs)
        begin_s, end_s = self._links.write(source, write.peer, write.runs, block_bytes, now_s)
        if self.recorder is not None:
            num_bytes = num_blocks * block_bytes
            self.recorder.write(source, write.peer, write.immediate, begin_s, end_s, num_bytes)
        written = Written(write.ticket, num_blocks * block_bytes, end_s - begin_s, end_s)
        self.loop.at(end_s, instance.receive, written)
        self.loop.at(end_s, target.receive, Arrived(write.immediate, num_blocks))

    # --- controller and launcher -----------------------------------------------------------------------------------

    def _tell_controller(self, message: Message) -> None:
        self.controller.handle(message, self.loop.now_s)
        self._look()

    def _beat(self) -> None:
        self._look()
        self.loop.after(_CONTROLLER_BEAT_S, self._beat)

    def _look(self) -> None:
        self.controller.tick(self.loop.now_s)
        for address, message in self.controller.take_messages():
            if isinstance(message, RegistrationRefused):
                raise AssertionError(f"the controller refuses {address}: {message.reason}")
            self.send(CONTROLLER, address, message)
        self.controller.gone_addresses.clear()

    def _tell_launcher(self, message: Message) -> None:
        match message:
            case StartInstance():
                cost = next(
                    (c for c, r in zip(self._costs, self._config.roles, strict=True) if r is message.role), None
                )
                self.loop.after(self._config.simulate.start_s, self._add, message.role, cost or self._costs[0])
            case StopInstance():
                instance = self.instances.pop(message.instance)
                instance.is_gone = True
                self._links.forget(message.instance)
                self.send(LAUNCHER, CONTROLLER, InstanceExited(message.instance, "retired", _EPOCH))
            case _:
                raise AssertionError(f"a launcher does not take a {type(message).__name__}")

    def _add(self, role: Role, cost: CostModel) -> None:
        number, self.num_started = self.num_started, self.num_started + 1
        name = f"{role}-{number}"
        config = self._config
        noise = Noise(config.simulate.noise_fraction, (self._seed, number))
        instance = SimInstance(name, role, config, cost, noise, self, self._coalesce)
        self.instances[name] = instance
        block_bytes = cost.block_bytes(config.engine.block_size)
        pool = PoolDescriptor(
            node="simulated", layout_fingerprint=f"{cost.model}/{config.engine.block_size}",
            num_blocks=instance.num_blocks, block_bytes=block_bytes, endpoints={BACKEND: b""},
        )  # fmt: skip
        model = ModelInfo(
            name=cost.model, dtype="simulated", vocab_size=cost.vocab_size, max_model_tokens=cost.max_model_tokens
        )
        peer = PeerInfo(name, name, pool)
        self.send(
            name, CONTROLLER,
            Register(
                peer, role, model, config.engine.block_size, config.engine.max_choices, __version__, _EPOCH,
                config.engine.max_batch_tokens,
            ),
        )  # fmt: skip
        self.loop.after(config.simulate.message_s, instance.turn)
