"""A controller alone, its instances played by the test: what it is told, and what it says to whom."""

from collections.abc import Sequence
from typing import TypeVar

from flowkv import __version__
from flowkv.cluster.controller import Controller
from flowkv.config import RestartConfig, SchedulingConfig, SloConfig
from flowkv.cost import prefill_pairs
from flowkv.messages import (
    ClusterStatus,
    Dispatch,
    FrontendHello,
    LoadReport,
    Message,
    PeerInfo,
    Register,
    RegistrationRefused,
    StepSample,
    Submit,
)
from flowkv.types import InstanceCounters, InstanceLoad, LinkStatus, ModelInfo, Request, Role, SamplingParams
from tests.pools import descriptor

STALL_S = 5
LAUNCHER = "launcher"
MODEL = ModelInfo(name="m", dtype="float32", vocab_size=10, max_model_tokens=1000)
FIXED = SchedulingConfig(roles="fixed")

Out = list[tuple[str, Message]]
M = TypeVar("M", bound=Message)


class Rig:
    """A controller and what it says, by address. Everyone is linked to everyone as soon as it registers."""

    def __init__(
        self,
        *roles: Role,
        num_blocks: int = 100,
        max_choices: int = 8,
        scheduling: SchedulingConfig = FIXED,
        slo: SloConfig | None = None,
        launcher_address: str | None = None,
        restart: RestartConfig | None = None,
    ) -> None:
        self.controller = Controller(
            len(roles), "epoch", "local", slo=slo, scheduling=scheduling, launcher_address=launcher_address,
            restart=restart,
        )  # fmt: skip
        self.now_s = 0.0
        self.controller.tick(self.now_s)
        self.num_blocks = num_blocks
        self.max_choices = max_choices
        self.names: list[str] = []
        self.roles: dict[str, Role] = {}
        self.sequences: dict[str, int] = {}  # of the last dispatch that was sent to each
        self.take(FrontendHello("f", "f"))
        for i, role in enumerate(roles):
            self.register(f"{role}-{i}", role)

    # --- instances -------------------------------------------------------------------------------------------------

    def register(self, name: str, role: Role, layout: str = "L", model: ModelInfo = MODEL) -> Out:
        """All of its answers, its links to and from all others included."""
        out = self.come(name, role, layout, model)
        if any(isinstance(message, RegistrationRefused) for _, message in out):
            return out
        for sender in self.names:
            out += self.links_up(sender, *(other for other in self.names if other != sender))
        return out

    def come(self, name: str, role: Role, layout: str = "L", model: ModelInfo = MODEL) -> Out:
        """It registers, and has no link yet."""
        peer = PeerInfo(name, name, descriptor(name, layout, self.num_blocks))
        out = self.take(Register(peer, role, model, 16, self.max_choices, __version__, "epoch"))
        if not any(isinstance(message, RegistrationRefused) for _, message in out):
            self.names.append(name)
            self.roles[name] = role
        return out

    def links_up(self, name: str, *peers: str) -> Out:
        links = [LinkStatus(peer=peer, backend="local") for peer in peers]
        load = InstanceLoad(free_blocks=self.num_blocks)
        return self.take(LoadReport(name, 0, self.roles[name], load, InstanceCounters(), [], [], links=links))

    def report(
        self,
        name: str,
        sequence: int | None = None,
        steps: list[StepSample] | None = None,
        *,
        finished: Sequence[tuple[str, int]] = (),
        returned: Sequence[str] = (),
        role: Role | None = None,
        is_drained: bool = False,
        **load: int,
    ) -> Out:
        """`sequence` None: all that it was sent has come."""
        self.roles[name] = role or self.roles[name]
        return self.take(
            LoadReport(
                name, self.sequences.get(name, 0) if sequence is None else sequence, self.roles[name],
                InstanceLoad(free_blocks=self.num_blocks, **load), InstanceCounters(), steps or [], list(finished),
                returned=list(returned), is_drained=is_drained,
            )
        )  # fmt: skip

    def finished(
        self,
        name: str,
        *request_ids: str,
        handed_over: Sequence[tuple[str, str]] = (),
        unanswered: Sequence[tuple[str, str]] = (),
    ) -> LoadReport:
        """As from an instance that has nothing else to say."""
        done = [(request_id, 1) for request_id in request_ids]
        return LoadReport(
            name, 99, self.roles[name], InstanceLoad(), InstanceCounters(), [], done, list(handed_over),
            unanswered=list(unanswered),
        )  # fmt: skip

    def teach(
        self, name: str, decode_s: float = 0.01, token_s: float = 1e-4, choice_s: float = 0.0, count: int = 30
    ) -> None:
        """Steps of a speed that is plain: so much a step, a prompt token, a choice; attention costs nothing."""
        steps = []
        for i in range(count):
            choices, tokens = 1 + i % 8, 100 + 50 * (i % 8)
            steps.append(decode_step(choices, choices * 10 * (1 + i % 3), decode_s + choices * choice_s))
            steps.append(prefill_step(tokens, tokens * token_s))
        self.report(name, steps=steps)

    # --- time ------------------------------------------------------------------------------------------------------

    def wait(self, seconds: int, *heard: str) -> Out:
        """What is said while time passes; the instances `heard` report every second."""
        for _ in range(seconds):
            self.now_s += 1.0
            for name in heard:
                self.controller.handle(self.finished(name), self.now_s)
            self.controller.tick(self.now_s)
        return self._taken()

    def tick(self, seconds: float = 0.5) -> Out:
        """What is said at a look at the cluster, so much later."""
        self.now_s += seconds
        self.controller.tick(self.now_s)
        return self._taken()

    def _taken(self) -> Out:
        return [out for out in self.controller.take_messages() if not isinstance(out[1], ClusterStatus)]

    # --- messages --------------------------------------------------------------------------------------------------

    def take(self, message: Message) -> Out:
        self.controller.handle(message, self.now_s)
        out = self.controller.take_messages()
        for address, answer in out:
            if isinstance(answer, Dispatch):
                self.sequences[address] = answer.sequence
        return out

    def status(self) -> ClusterStatus:
        [(_, status)] = self.take(FrontendHello("f", "f"))
        assert isinstance(status, ClusterStatus)
        return status

    def submit(self, request_id: str, num_tokens: int = 20, max_tokens: int = 10, priority: int = 0) -> Out:
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(
            request_id=request_id, prompt_ids=range(num_tokens), sampling=sampling, priority=priority
        )  # fmt: skip
        return self.take(Submit("f", request))

    def dispatch(self, request_id: str, **kwargs: int) -> tuple[str, Dispatch]:
        [dispatched] = dispatches(self.submit(request_id, **kwargs))
        return dispatched


def dispatches(out: Out) -> list[tuple[str, Dispatch]]:
    return [(address, message) for address, message in out if isinstance(message, Dispatch)]


def of_type(out: Out, kind: type[M]) -> list[M]:
    return [message for _, message in out if isinstance(message, kind)]


def prefill_step(num_tokens: int, seconds: float, decode_choices: int = 0, context: int = 0) -> StepSample:
    return StepSample(num_tokens, prefill_pairs(0, num_tokens), decode_choices, context, seconds)


def decode_step(choices: int, context: int, seconds: float, num_steps: int = 1) -> StepSample:
    return StepSample(0, 0, choices * num_steps, context * num_steps, seconds * num_steps, num_steps)
