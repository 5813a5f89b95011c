"""A controller and its instances, made of one thread that answers each request as a test wants."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import zmq

from flowkv.messages import Abort, Accepted, AnyMessage, ClusterStatus, FrontendHello, Lost, Outputs, Rejected, Submit
from flowkv.types import (
    FinishReason,
    InstanceCounters,
    InstanceLoad,
    InstanceStatus,
    ModelInfo,
    Output,
    Request,
    Role,
    TokenLogprobs,
)
from flowkv.wire import Mailbox, Outbox, SyncContext

Answer = Callable[[Request], Sequence[Output | Rejected | Lost]]

VOCAB_SIZE = 512
CONTEXT_TOKENS = 1000


def status(*, ready: bool = True, max_request_tokens: int = CONTEXT_TOKENS) -> ClusterStatus:
    model = ModelInfo(name="toy", dtype="float32", vocab_size=VOCAB_SIZE, max_model_tokens=CONTEXT_TOKENS)
    instance = InstanceStatus(
        name="p0.1",
        role=Role.PREFILL,
        num_blocks=64,
        block_size=16,
        load=InstanceLoad(free_blocks=64),
        counters=InstanceCounters(num_steps=3),
    )
    return ClusterStatus(ready, model if ready else None, max_request_tokens, [instance])


def logprob(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, [(token_id, -0.5), (66, float("-inf"))])


def outputs(request: Request, token_ids: list[int], *, choice: int = 0) -> list[Output | Rejected]:
    """A token each, cut at `max_tokens` or a stop id, as an engine would."""
    sampling = request.sampling
    result: list[Output | Rejected] = []
    for index, token_id in enumerate(token_ids[: sampling.max_tokens]):
        stopped = token_id in sampling.stop_token_ids
        is_last = index + 1 == min(len(token_ids), sampling.max_tokens)
        result.append(
            Output(
                request.request_id,
                choice,
                index,
                [token_id],
                FinishReason.STOP if stopped else FinishReason.LENGTH if is_last else None,
                token_id if stopped else None,
                None if sampling.logprobs is None else [logprob(token_id)],
                _prompt_logprobs(request) if index == 0 and choice == 0 else None,
            )
        )
        if stopped:
            break
    return result or [_empty(request, choice)]


def say(text: str) -> Answer:
    """Every choice of every request answers with the bytes of `text`, and its number where n is more than 1."""

    def answer(request: Request) -> list[Output | Rejected]:
        n = request.sampling.n
        texts = [text if n == 1 else f"{text}{choice}" for choice in range(n)]
        return [
            output for choice in range(n) for output in outputs(request, list(texts[choice].encode()), choice=choice)
        ]

    return answer


class FakeCluster:
    """Keeps every message in `received`. Outputs go out one a message, so that each is a delta of its own."""

    def __init__(self, folder: Path) -> None:
        self.answer: Answer = say("hello")
        self.status = status()
        self.received: list[AnyMessage] = []
        self.is_stopped = False  # it answers nothing
        self.num_lost_submits = 0  # so many submissions are ignored
        self._context: SyncContext = zmq.Context()
        self._mailbox = Mailbox(self._context, f"ipc://{folder}/controller")
        self._outbox = Outbox(self._context)
        self._frontend_address: str | None = None
        self._known: set[str] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run)

    @property
    def address(self) -> str:
        return self._mailbox.address

    @property
    def requests(self) -> list[Request]:
        return [message.request for message in self.received if isinstance(message, Submit)]

    @property
    def submits(self) -> list[Submit]:
        return [message for message in self.received if isinstance(message, Submit)]

    @property
    def aborts(self) -> list[Abort]:
        return [message for message in self.received if isinstance(message, Abort)]

    def __enter__(self) -> "FakeCluster":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._thread.join()
        self._mailbox.close()
        self._outbox.close(linger_s=0)
        self._context.term()

    def send(self, *answers: Output | Rejected | Lost | ClusterStatus) -> None:
        """Only from `answer`, or while the thread is not running: sockets belong to one thread."""
        assert self._frontend_address is not None
        for answer in answers:
            message = Outputs("d0.1", [answer]) if isinstance(answer, Output) else answer
            self._outbox.send(self._frontend_address, message)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds after some message; fails the test if it does not come true."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout=10)

    def _run(self) -> None:
        while not self._stopping:
            if self._mailbox.socket.poll(20):
                for message in self._mailbox.receive_all():
                    self._handle(message)

    def _handle(self, message: AnyMessage) -> None:
        self.received.append(message)  # before its answer can be read
        if self.is_stopped:
            pass
        elif isinstance(message, FrontendHello):
            self._frontend_address = message.address
            self._outbox.send(message.address, self.status)
        elif isinstance(message, Submit):
            self._on_submit(message)
        with self._changed:
            self._changed.notify_all()

    def _on_submit(self, message: Submit) -> None:
        assert self._frontend_address is not None
        if self.num_lost_submits > 0:
            self.num_lost_submits -= 1
            return
        self._outbox.send(self._frontend_address, Accepted(message.request.request_id))
        if message.request.request_id not in self._known:
            self._known.add(message.request.request_id)
            self.send(*self.answer(message.request))


def _prompt_logprobs(request: Request) -> list[TokenLogprobs] | None:
    if request.sampling.prompt_logprobs is None:
        return None
    return [logprob(token_id) for token_id in request.prompt_ids[1:]]


def _empty(request: Request, choice: int) -> Output:
    prompt_logprobs = _prompt_logprobs(request) if choice == 0 else None
    return Output(request.request_id, choice, 0, [], FinishReason.LENGTH, prompt_logprobs=prompt_logprobs)
