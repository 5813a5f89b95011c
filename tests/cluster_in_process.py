"""A whole cluster in one process, on a clock of its own: the real engines and controller over toy or real runners.

`run` picks at random what happens next (deliver a message of some channel, start or end a step, complete a write), so
that a seed is an interleaving. Channels between two parties are in order, as in a real cluster; nothing else is.

With `Faults` time passes too (a beat, a third of a lease, is an event like any other), and handoff messages, writes and
counts come to harm. Nodes can be frozen, woken and killed at any moment.
"""

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import msgspec

from flowkv import __version__
from flowkv.cluster.controller import Controller
from flowkv.cluster.rebuild import Rebuild
from flowkv.config import EngineConfig, SchedulingConfig
from flowkv.engine.batch import Batch, Runner
from flowkv.engine.effects import CancelWrite, Connect, Disconnect, Effect, Expect, Forget, MoveBlocks, Send, Write
from flowkv.engine.engine import Engine
from flowkv.engine.toy import ToyRunner, toy_layout
from flowkv.errors import ProtocolError
from flowkv.kv.layout import KvLayout
from flowkv.messages import (
    Abort,
    Accepted,
    Cancel,
    CancelAck,
    ClusterStatus,
    FrontendHello,
    InstanceExited,
    Introduce,
    KvReady,
    Lost,
    Message,
    Outputs,
    PeerInfo,
    Refused,
    Register,
    Registered,
    Rejected,
    Release,
    Renew,
    Renewed,
    Reserve,
    Reserved,
    Submit,
)
from flowkv.transfer.base import Written
from flowkv.transfer.local import LocalTransfer
from flowkv.types import (
    ATTEMPT_MARK,
    FinishReason,
    ModelInfo,
    Output,
    Request,
    Role,
    SamplingParams,
    TokenLogprobs,
    attempt_id,
)

CONTROLLER, FRONTEND, LAUNCHER, EPOCH = "controller", "frontend", "launcher", "epoch"
BEAT_S = 1.0
LEASE_S = 3 * BEAT_S
HANDOFF = (Reserve, Reserved, Refused, KvReady, Renew, Renewed, Release, Cancel, CancelAck)
RunnerFactory = Callable[[KvLayout, memoryview, int], Runner]


@dataclass(frozen=True)
class Faults:
    """How probable each is, of a message between instances, of a write, of the next event."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0  # it may come after later ones
    failed_write: float = 0.0  # nobody knows how much of it was made
    lost_arrival: float = 0.0  # the bytes come, the count does not
    beat: float = 0.02


@dataclass
class Answer:
    """All that the frontend has heard of one choice."""

    tokens: dict[int, int] = field(default_factory=dict)  # by output index
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    num_tokens: int | None = None  # known once it has finished
    error: str | None = None
    instances: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        assert sorted(self.tokens) == list(range(self.num_tokens or 0)), "a gap in the stream"
        return [self.tokens[i] for i in sorted(self.tokens)]

    def add(self, instance: str, output: Output, may_repeat: bool) -> None:
        """Outputs of two instances may come in any order; their indices tell the real one.

        Only what a dead instance had put out before its handoff was known may come again, and then the same.
        """
        for i, token_id in enumerate(output.token_ids):
            known = self.tokens.get(output.index + i)
            assert known is None or (may_repeat and known == token_id), "a token came twice"
            self.tokens[output.index + i] = token_id
            self.instances.append(instance)
            if output.logprobs is not None:
                self.logprobs[output.index + i] = output.logprobs[i]
        if output.finish_reason is not None:
            assert self.finish_reason in ({None, output.finish_reason} if may_repeat else {None}), "it ends twice"
            self.finish_reason, self.num_tokens = output.finish_reason, output.index + len(output.token_ids)
            self.error = output.error
        assert self.num_tokens is None or max(self.tokens, default=-1) < self.num_tokens, "tokens after the end"
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs

    @property
    def has_ended(self) -> bool:
        """To the last token."""
        return self.num_tokens is not None and len(self.tokens) == self.num_tokens

    def restart(self) -> None:
        """The next attempt goes on after the tokens without a gap before them."""
        if not self.has_ended:
            num_out = next(i for i in count() if i not in self.tokens)
            self.tokens = {i: self.tokens[i] for i in range(num_out)}
            self.logprobs = {i: logprob for i, logprob in self.logprobs.items() if i < num_out}
            self.finish_reason = self.num_tokens = None


@dataclass
class Live:
    """A request that the frontend waits for, in its present attempt."""

    submit: Submit
    num_attempts: int = 0
    is_answered: bool = False
    is_claim: bool = False

    @property
    def is_waiting(self) -> bool:
        """For an answer, without which it is submitted again."""
        return (self.num_attempts > 0 or self.is_claim) and not self.is_answered

    def next_submit(self) -> Submit:
        return msgspec.structs.replace(self.submit, is_claim=self.is_claim)


class Node:
    """One instance: an engine, its pool and its runner."""

    def __init__(
        self, name: str, role: Role, config: EngineConfig, num_blocks: int, network: dict[str, LocalTransfer],
        layout: KvLayout, make_runner: RunnerFactory,
    ) -> None:  # fmt: skip
        self.name = name
        self.role = role
        buffer = memoryview(bytearray(num_blocks * layout.block_bytes))
        self.runner = make_runner(layout, buffer, num_blocks)
        self.transfer = LocalTransfer(network, name, buffer, layout.block_bytes, layout.fingerprint)
        self.engine = Engine(name, config, num_blocks, role, CONTROLLER, LEASE_S, address=name)
        self.register: Register | None = None
        self.peer = PeerInfo(name, name, self.transfer.descriptor)
        self.batch: Batch | None = None
        self.writes: deque[Write] = deque()
        self.written: list[Written] = []  # beside what the transfer reports
        self.is_frozen = False
        self.holds_writes = False


class Cluster:
    def __init__(
        self,
        roles: list[Role],
        *,
        num_blocks: int = 64,
        config: EngineConfig | None = None,
        seed: int | None = None,
        layout: KvLayout | None = None,
        make_runner: RunnerFactory = ToyRunner,
        settled: bool = True,
        faults: Faults | None = None,
        scheduling: SchedulingConfig | None = None,
    ) -> None:
        self.config = config or EngineConfig(block_size=4, max_batch_tokens=16, max_choices=8)
        self.random = None if seed is None else random.Random(seed)
        self.now_s = 0.0
        self.faults: Faults | None = None  # none before everyone knows everyone
        self.late: list[tuple[str, str, Message]] = []  # (sender, receiver, message)
        scheduling = scheduling or SchedulingConfig(roles="fixed")
        self.scheduling, self.num_controllers = scheduling, 1
        self.dead: list[str] = []
        self.controller = Controller(len(roles), EPOCH, "local", scheduling=scheduling)
        layout = layout or toy_layout(self.config.block_size)
        self.network: dict[str, LocalTransfer] = {}
        self.nodes: dict[str, Node] = {}
        self.channels: defaultdict[tuple[str, str], deque[Message]] = defaultdict(deque)
        self.answers: dict[tuple[str, int], Answer] = defaultdict(Answer)
        self.rejected: dict[str, Rejected] = {}
        self.num_rejected = 0
        self.num_lost = 0
        self.known_controller = CONTROLLER
        self.num_attempts: Counter[str] = Counter()
        self.live: dict[str, Live] = {}  # by the id of its first attempt
        self.accepted: set[str] = set()
        self.dropped: set[tuple[str, int]] = set()  # choices that nobody waits for
        self.has_killed = False
        self._post(FRONTEND, CONTROLLER, FrontendHello(FRONTEND, FRONTEND))
        for i, role in enumerate(roles):
            node = Node(f"{role}-{i}", role, self.config, num_blocks, self.network, layout, make_runner)
            self.nodes[node.name] = node
            model = ModelInfo(name="toy", dtype="toy", vocab_size=256, max_model_tokens=4096)
            node.register = Register(
                node.peer, role, model, self.config.block_size, self.config.max_choices, __version__, EPOCH
            )  # fmt: skip
            self._post(node.name, CONTROLLER, node.register)
        if settled:
            self.run()
        self.faults = faults

    # --- from outside ----------------------------------------------------------------------------------------------

    def submit(self, request_id: str, prompt_ids: list[int], **sampling: object) -> None:
        params = SamplingParams(**({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
        request = Request(request_id=request_id, prompt_ids=prompt_ids, sampling=params)
        self.live[request_id] = Live(Submit(FRONTEND, request, controller=self.known_controller))
        self._post(FRONTEND, CONTROLLER, self.live[request_id].submit)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        live = self.live.get(request_id)
        if choice is None:
            self.live.pop(request_id, None)
        else:
            self.dropped.add((request_id, choice))
        self._post(FRONTEND, CONTROLLER, Abort(live.submit.request.request_id if live else request_id, choice))

    def kill(self, name: str) -> None:
        """As a process dies: what it has sent still arrives, what it was sent does not."""
        del self.nodes[name]
        self.has_killed = True
        for sender, receiver in list(self.channels):
            if receiver == name:
                del self.channels[sender, receiver]
        self.late = [late for late in self.late if late[1] != name]
        self.dead.append(name)
        self._post(LAUNCHER, CONTROLLER, InstanceExited(name, "was killed"))

    def restart_controller(self) -> None:
        """The controller is killed, with some of what it was sent and had sent; another takes its place."""
        for channel, queue in self.channels.items():
            while queue and CONTROLLER in channel and self._happens(0.5):
                queue.pop() if channel[0] == CONTROLLER else queue.popleft()
        self.num_controllers += 1
        self.controller = Controller(
            len(self.nodes), EPOCH, "local", scheduling=self.scheduling,
            name=f"{CONTROLLER}~{self.num_controllers}", rebuild=Rebuild(self.nodes, has_nodes=False),
        )  # fmt: skip
        self._post(FRONTEND, CONTROLLER, FrontendHello(FRONTEND, FRONTEND))
        for name in self.dead:
            self._post(LAUNCHER, CONTROLLER, InstanceExited(name, "was killed"))

    def freeze(self, name: str) -> None:
        """As SIGSTOP does. What it has posted is written when it wakes, or meanwhile, as a network card would."""
        self.nodes[name].is_frozen = True
        self.nodes[name].holds_writes = not self._happens(0.3)

    def wake(self, name: str) -> None:
        if name in self.nodes:
            self.nodes[name].is_frozen = self.nodes[name].holds_writes = False

    def pass_time(self, beats: int = 1) -> None:
        """Time in which nothing else happens, a beat after the other."""
        for _ in range(beats):
            self.now_s += BEAT_S
            self.controller.tick(self.now_s)
            self._carry_out_controller()
            for live in self.live.values():
                if live.is_waiting:
                    self._post(FRONTEND, CONTROLLER, live.next_submit())
            for node in self.nodes.values():
                if not node.is_frozen:
                    node.engine.tick(self.now_s)
                    self._carry_out(node)

    def run(self, max_events: int = 100_000) -> None:
        """Until nothing can happen any more."""
        for _ in range(max_events):
            if not self.step():
                return
        raise AssertionError("the cluster does not come to rest")

    def step(self) -> bool:
        """Let one thing happen. False if nothing can."""
        events = self._possible()
        if self.faults is not None and not self.is_at_rest and (not events or self._happens(self.faults.beat)):
            self.pass_time()
            return True
        if not events:
            return False
        self.now_s += 0.001
        (events[0] if self.random is None else self.random.choice(events))()
        return True

    @property
    def is_at_rest(self) -> bool:
        is_waiting = any(live.is_waiting for live in self.live.values())
        is_idle = all(node.engine.is_idle for node in self.nodes.values())
        return is_idle and not (self.controller.num_assignments or is_waiting)

    def ids(self, request_id: str, choice: int = 0) -> list[int]:
        answer = self.answers[request_id, choice]
        assert answer.finish_reason is not None, f"{request_id}/{choice} has not finished"
        return answer.ids

    def check_at_rest(self) -> None:
        """Nothing runs, nothing is held, and every block is free."""
        for node in self.nodes.values():
            node.engine.check_integrity()
            assert node.engine.is_idle, f"{node.name} is not idle: {node.engine.load}"
            assert node.engine.blocks.num_free == node.engine.blocks.num_blocks, f"{node.name} has lost blocks"
        assert self.controller.num_assignments == 0

    # --- inside ----------------------------------------------------------------------------------------------------

    def _possible(self) -> list[Callable[[], None]]:
        events: list[Callable[[], None]] = []
        frozen = {node.name for node in self.nodes.values() if node.is_frozen}
        events += [partial(self._deliver, c) for c, queue in self.channels.items() if queue and c[1] not in frozen]
        events += [partial(self._deliver_late, late) for late in self.late if late[1] not in frozen]
        for node in self.nodes.values():
            if node.writes and not node.holds_writes:
                events.append(partial(self._write, node))
            if node.is_frozen:
                continue
            if node.transfer.has_completions or node.written:
                events.append(partial(self._complete, node))
            if node.batch is not None or (node.engine.has_work and (self._start_step(node))):
                events.append(partial(self._end_step, node))
        return events

    def _start_step(self, node: Node) -> bool:
        node.batch = node.engine.next_batch(self.now_s)
        self._carry_out(node)
        return node.batch is not None

    def _end_step(self, node: Node) -> None:
        batch, node.batch = node.batch, None
        assert batch is not None
        node.engine.on_result(node.runner.run(batch), 0.001, self.now_s)
        self._carry_out(node)

    def _happens(self, probability: float) -> bool:
        return self.random is not None and self.random.random() < probability

    def _deliver(self, channel: tuple[str, str]) -> None:
        self._receive(channel[1], self.channels[channel].popleft())

    def _deliver_late(self, late: tuple[str, str, Message]) -> None:
        self.late.remove(late)
        self._receive(late[1], late[2])

    def _carry_out_controller(self) -> None:
        for address, out in self.controller.take_messages():
            self._post(CONTROLLER, address, out)

    def _receive(self, receiver: str, message: Message) -> None:
        if receiver == CONTROLLER:
            try:
                self.controller.handle(message, self.now_s)
            except ProtocolError:  # a new controller does not know everyone yet
                assert self.num_controllers > 1
            self._carry_out_controller()
        elif receiver == FRONTEND:
            self._hear(message)
        elif receiver in self.nodes and isinstance(message, Introduce):
            node = self.nodes[receiver]
            assert node.register is not None
            self._post(receiver, CONTROLLER, node.engine.introduction(node.register))
        elif receiver in self.nodes and not isinstance(message, Registered):  # what the process around it takes
            self.nodes[receiver].engine.handle(message, self.now_s)
            self._carry_out(self.nodes[receiver])

    def _hear(self, message: Message) -> None:
        match message:
            case Accepted():
                self.accepted.add(message.request_id)
                if (live := self._live(message.request_id)) is not None:
                    live.is_answered, live.is_claim = True, False
            case Rejected():
                self.rejected[message.request_id.partition(ATTEMPT_MARK)[0]] = message
                self.live.pop(message.request_id.partition(ATTEMPT_MARK)[0], None)
                self.num_rejected += 1
            case Lost():
                self._resume(message.request_id)
            case ClusterStatus() if message.controller != self.known_controller:
                self.known_controller = message.controller
                self._claim_all()
            case Outputs():
                for output in message.outputs:
                    self._hear_output(message.instance, output)
            case _:
                pass

    def _claim_all(self) -> None:
        for live in self.live.values():
            live.is_answered, live.is_claim = False, True
            live.submit = msgspec.structs.replace(live.submit, controller=self.known_controller)
            self._post(FRONTEND, CONTROLLER, live.next_submit())

    def _live(self, request_id: str) -> Live | None:
        """None where nobody waits for this attempt any more."""
        live = self.live.get(request_id.partition(ATTEMPT_MARK)[0])
        return live if live is not None and live.submit.request.request_id == request_id else None

    def _hear_output(self, instance: str, output: Output) -> None:
        first_id = output.request_id.partition(ATTEMPT_MARK)[0]
        if output.request_id != attempt_id(first_id, self.num_attempts[first_id]):
            if output.finish_reason is None:
                self._post(FRONTEND, CONTROLLER, Abort(output.request_id))
            return
        self.answers[first_id, output.choice].add(instance, output, self.has_killed)
        if all(self._is_over(first_id, choice) for choice in range(self._num_choices(first_id))):
            self.live.pop(first_id, None)

    def _num_choices(self, first_id: str) -> int:
        return self.live[first_id].submit.request.sampling.n if first_id in self.live else 0

    def _is_over(self, first_id: str, choice: int) -> bool:
        return self.answers[first_id, choice].has_ended or (first_id, choice) in self.dropped

    def _resume(self, request_id: str) -> None:
        """As the frontend does."""
        self.num_lost += 1
        live, first_id = self._live(request_id), request_id.partition(ATTEMPT_MARK)[0]
        if live is None:
            self._post(FRONTEND, CONTROLLER, Abort(request_id))
            return
        choices = [c for c in range(self._num_choices(first_id)) if not self._is_over(first_id, c)]
        output_ids = {}
        for choice in choices:
            self.answers[first_id, choice].restart()
            output_ids[choice] = list(self.answers[first_id, choice].tokens.values())
        if len(choices) == self._num_choices(first_id) and not any(output_ids.values()):
            output_ids = {}
        live.num_attempts = self.num_attempts[first_id] = live.num_attempts + 1
        live.is_answered = live.is_claim = False
        request = msgspec.structs.replace(
            live.submit.request, request_id=attempt_id(first_id, live.num_attempts)
        )  # fmt: skip
        live.submit = Submit(FRONTEND, request, output_ids, request_id, controller=self.known_controller)
        self._post(FRONTEND, CONTROLLER, live.submit)

    def _write(self, node: Node) -> None:
        write = node.writes.popleft()
        faults = self.faults or Faults()
        if self._happens(faults.failed_write):
            if self._happens(0.5):
                self._move(node, write, is_counted=self._happens(0.5))
            node.written.append(Written(write.ticket, 0, 0.0, self.now_s, "the link broke"))
        else:
            node.written.append(self._move(node, write, is_counted=not self._happens(faults.lost_arrival)))

    def _move(self, node: Node, write: Write, is_counted: bool) -> Written:
        """Write the bytes; the peer hears of it only if they are to be counted."""
        arrived = self.network[write.peer]._arrived
        num_arrived = len(arrived)
        node.transfer.submit(write.ticket, write.peer, write.runs, write.immediate)
        if not is_counted:
            del arrived[num_arrived:]
        return node.transfer._written.pop()

    def _cancel_write(self, node: Node, ticket: int) -> None:
        """In time or not, as it happens."""
        node.transfer.cancel(ticket)
        for write in [write for write in node.writes if write.ticket == ticket]:
            if self._happens(0.5):
                node.writes.remove(write)
                node.written.append(Written(ticket, 0, 0.0, self.now_s))

    def _complete(self, node: Node) -> None:
        written, arrived, linked = node.transfer.poll()
        written, node.written = [*written, *node.written], []
        for link in linked:
            node.engine.on_linked(link, self.now_s)
        for completion in written:
            node.engine.on_written(completion, self.now_s)
        for arrival in arrived:
            node.engine.on_arrived(arrival, self.now_s)
        self._carry_out(node)

    def _carry_out(self, node: Node) -> None:
        for effect in node.engine.take_effects():
            self._do(node, effect)
        node.engine.check_integrity()

    def _do(self, node: Node, effect: Effect) -> None:
        match effect:
            case Send():
                self._post(node.name, effect.address, effect.message)
            case Write():
                node.writes.append(effect)
            case Connect():
                node.transfer.connect(effect.peer.instance, effect.peer.pool)
            case MoveBlocks():
                node.runner.copy_blocks(effect.copies)
            case CancelWrite():
                self._cancel_write(node, effect.ticket)
            case Expect():
                node.transfer.expect(effect.immediate)
            case Forget():
                node.transfer.forget(effect.immediate)
            case Disconnect():
                node.transfer.disconnect(effect.peer.instance)

    def _post(self, sender: str, receiver: str, message: Message) -> None:
        if receiver not in self.nodes and receiver not in (CONTROLLER, FRONTEND):
            return
        if self.faults is not None and isinstance(message, HANDOFF):
            if self._happens(self.faults.lost):
                return
            if self._happens(self.faults.doubled):
                self.late.append((sender, receiver, message))
            if self._happens(self.faults.late):
                self.late.append((sender, receiver, message))
                return
        self.channels[sender, receiver].append(message)
