"""What the controller wants of an instance: to take requests, to drop them, to change its role, to end."""

from collections.abc import Callable

from flowkv.engine.effects import Effect, Send
from flowkv.engine.handoff_receiver import HandoffReceiver
from flowkv.engine.handoff_sender import HandoffSender
from flowkv.engine.report import Reporter
from flowkv.engine.requests import Requests
from flowkv.engine.scheduler import HybridScheduler
from flowkv.messages import Abort, Dispatch, Outputs, SetRole
from flowkv.types import FinishReason, Output, Role


class Orders:
    """Carries them out. What is given back (`LoadReport.returned`) is forgotten here: it is the controller's again."""

    def __init__(
        self,
        name: str,
        scheduler: HybridScheduler,
        requests: Requests,
        sender: HandoffSender,
        receiver: HandoffReceiver,
        reporter: Reporter,
        emit: Callable[[Effect], None],
    ) -> None:
        self._name = name
        self._scheduler = scheduler
        self._requests = requests
        self._sender = sender
        self._receiver = receiver
        self._reporter = reporter
        self._emit = emit
        self.is_draining = False

    def on_dispatch(self, message: Dispatch) -> None:
        blocks = self._scheduler.blocks
        self._reporter.dispatched(message.sequence)
        if self._requests.has(message.request.request_id):
            return  # a message that came twice
        if self.is_draining:
            self._reporter.returned(message.request.request_id)
        elif blocks.num_blocks_for(message.request.max_total_tokens) > blocks.num_blocks:
            self._fail(message, f"the request may need more than the {blocks.num_blocks} blocks of {self._name}")
        elif message.request.sampling.n > (most := self._scheduler.config.max_choices):
            self._fail(message, f"n ({message.request.sampling.n}) is more than the {most} choices of {self._name}")
        elif message.output_ids:
            self._requests.resume(message)
        else:
            sequence = self._requests.add(message)
            if message.decode_instances:
                self._sender.expect(sequence, list(message.decode_instances))

    def on_abort(self, message: Abort) -> None:
        request_id, choice = message.request_id, message.choice
        self._receiver.abort(request_id, choice)
        held = self._sender.give_up(request_id) if choice is None else self._sender.drop_choice(request_id, choice)
        if held is not None:
            self._requests.hold(held)
            self._reporter.finished(request_id, held.num_choices)
        self._requests.abort(request_id, choice)

    def on_set_role(self, message: SetRole) -> None:
        """What has not begun would wait behind decodes: another instance may be glad of it."""
        is_flip = message.role is not self._scheduler.role
        self._scheduler.role = message.role
        if is_flip and message.role is Role.DECODE:
            self._give_back()
        self._reporter.is_due = True

    def on_drain(self) -> None:
        self.is_draining = True
        self._give_back()

    def _give_back(self) -> None:
        for request_id in self._requests.give_back():
            self._sender.give_up(request_id)
            self._reporter.returned(request_id)

    def _fail(self, message: Dispatch, reason: str) -> None:
        request_id = message.request.request_id
        outputs = [
            Output(request_id, choice, 0, [], FinishReason.ERROR, error=reason)
            for choice in range(message.request.sampling.n)
        ]
        self._emit(Send(message.frontend_address, Outputs(self._name, outputs)))
        self._reporter.finished(request_id, 0)
