"""Real instances under test, with this process as their controller and their frontend."""

import random
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path

import zmq

from flowkv.config import ClusterConfig
from flowkv.errors import FlowKVError
from flowkv.launch.node import Node
from flowkv.messages import (
    Abort,
    Dispatch,
    InstanceExited,
    LoadReport,
    Outputs,
    Register,
    Registered,
    StepSample,
    Usage,
)
from flowkv.profile.cells import Cell
from flowkv.profile.fit import Measured
from flowkv.sim.costs import StepShape
from flowkv.types import Request, Role, SamplingParams
from flowkv.wire import Mailbox

_NAME = "profiler"


class Subject:
    """One instance, and the samples that it has reported."""

    def __init__(self, rig: "Rig", register: Register, seed: int) -> None:
        self._rig = rig
        self._address = register.peer.address
        self._random = random.Random(seed)
        self._max_id = min(1000, register.model.vocab_size)
        self._num_dispatched = 0
        self._uncomputed: deque[int] = deque()  # prompt tokens of those that are not computed, oldest first
        self._num_outputs: dict[str, int] = {}  # of requests that run
        self.register = register
        self.samples: list[Measured] = []
        self.is_counted = False  # whether samples are kept
        self.is_settled = True  # every step that it made for us is reported

    def work(self, cells: Sequence[Cell], on_done: Callable[[], None]) -> Iterator[None]:
        """Do the cells; yields whenever there is something to wait for."""
        for cell in cells:
            yield from self._do(cell)
            on_done()

    def _do(self, cell: Cell) -> Iterator[None]:
        max_tokens = cell.num_steps or 2**30
        room = self.register.model.max_model_tokens - cell.context_tokens
        decodes = [self._dispatch(cell.context_tokens, min(max_tokens, room)) for _ in range(cell.num_decodes)]
        if not cell.prompts:
            while any(request_id in self._num_outputs for request_id in decodes):
                yield
            return
        while any(self._num_outputs.get(request_id, 2) < 2 for request_id in decodes):
            yield
        for num_tokens in cell.prompts:
            request_id = self._dispatch(num_tokens, 1)
            while request_id in self._num_outputs:
                yield
        for request_id in decodes:
            self._rig.send(self._address, Abort(request_id))
            self._num_outputs.pop(request_id, None)

    def on_outputs(self, outputs: Outputs) -> None:
        for output in outputs.outputs:
            if output.request_id not in self._num_outputs:
                continue
            self._num_outputs[output.request_id] += len(output.token_ids)
            if output.finish_reason is not None:
                del self._num_outputs[output.request_id]

    def on_report(self, report: LoadReport) -> None:
        load = report.load
        is_idle = not (load.num_waiting or load.num_prefilling or load.num_decoding)
        self.is_settled = is_idle and report.sequence == self._num_dispatched
        for step in report.steps:
            num_drawn = step.decode_choices + self._num_completed(step.prefill_tokens)
            if self.is_counted:
                self.samples.append(_measured(step, num_drawn))

    def _dispatch(self, num_prompt_tokens: int, max_tokens: int) -> str:
        self._num_dispatched += 1
        self.is_settled = False
        request_id = f"{self.register.peer.instance}-{self._num_dispatched}"
        prompt_ids = self._random.choices(range(self._max_id), k=num_prompt_tokens)
        request = Request(
            request_id=request_id, prompt_ids=prompt_ids,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        )  # fmt: skip
        self._num_outputs[request_id] = 0
        self._uncomputed.append(num_prompt_tokens)
        self._rig.send(self._address, Dispatch(self._num_dispatched, request, self._rig.address, []))
        return request_id

    def _num_completed(self, num_tokens: int) -> int:
        """How many prompts these tokens complete: an instance computes them in order."""
        num_completed = 0
        while num_tokens and self._uncomputed:
            taken = min(num_tokens, self._uncomputed[0])
            num_tokens -= taken
            self._uncomputed[0] -= taken
            if self._uncomputed[0] == 0:
                self._uncomputed.popleft()
                num_completed += 1
        return num_completed


class Rig:
    """All subjects; they work at the same time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.address = node.ipc_address(_NAME)
        self._mailbox = Mailbox(node.context, self.address)
        node.stack.callback(self._mailbox.close)
        node.poller.register(self._mailbox.socket, zmq.POLLIN)
        self.subjects: dict[str, Subject] = {}
        self.context: BaseContext | None = None  # for processes that need no model

    def start(self, config: ClusterConfig, folder: Path | None, name: str, concurrency: int) -> None:
        """Returns when all serve. FlowKVError if one cannot."""
        node = self._node
        self.context = node.preload(config)
        node.stack.callback(node.children.stop_all)
        template = node.instance_template(config, folder, name, self.address, secrets.token_hex(8))
        node.instances.start(template, [Role.MIXED] * concurrency, None)
        while len(self.subjects) < concurrency or not node.children.are_ready:
            self._wait()

    def run(self, cells: Sequence[Sequence[Cell]], on_done: Callable[[], None]) -> None:
        """`cells[i]` on the i-th subject."""
        working = [s.work(own, on_done) for s, own in zip(self.subjects.values(), cells, strict=True)]
        while working:
            working = [work for work in working if next(work, _OVER) is not _OVER]
            if working:
                self._wait()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Keep the samples of what runs in this context."""
        self._settle()
        for subject in self.subjects.values():
            subject.is_counted = True
        yield
        self._settle()
        for subject in self.subjects.values():
            subject.is_counted = False

    def send(self, address: str, message: Dispatch | Abort | Registered) -> None:
        self._node.outbox.send(address, message)

    def _settle(self) -> None:
        """Until the last steps are reported: at the end of the last request, with the samples of all before."""
        while not all(subject.is_settled for subject in self.subjects.values()):
            self._wait()

    def _wait(self, timeout_s: float | None = None) -> None:
        self._node.wait(timeout_s)
        for message in self._mailbox.receive_all():
            match message:
                case Register():
                    self._admit(message)
                case Outputs():
                    self.subjects[message.instance].on_outputs(message)
                case LoadReport():
                    self.subjects[message.instance].on_report(message)
                case InstanceExited():
                    raise FlowKVError(f"{message.instance} {message.reason} while it was measured")
                case Usage():
                    pass
                case _:
                    raise AssertionError(f"an instance sent a {type(message).__name__}")

    def _admit(self, register: Register) -> None:
        name = register.peer.instance
        self.subjects[name] = Subject(self, register, len(self.subjects))
        self.send(register.peer.address, Registered())


_OVER = object()


def _measured(step: StepSample, num_drawn: int) -> Measured:
    shape = StepShape(
        step.prefill_tokens, step.prefill_pairs, step.decode_choices, step.decode_context_tokens, num_drawn
    )
    return Measured(shape, step.seconds, step.num_steps)
