"""A request that somebody waits for: its choices, its stream, and the attempt that it is in."""

from dataclasses import dataclass, field

import msgspec

from flowkv.messages import Submit
from flowkv.server.access.caller import Caller
from flowkv.server.choice import Choice
from flowkv.server.records.timeline import Timeline
from flowkv.server.recovery import Recovery
from flowkv.server.stream import RequestStream
from flowkv.types import Request


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What the client wants of the text; engines know nothing of it."""

    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    kept_tokens: tuple[str, ...] = ()  # special ones that show nevertheless


@dataclass(slots=True)
class LiveRequest:
    """`request` has the id of the present attempt."""

    request: Request
    stream: RequestStream
    choices: list[Choice]
    caller: Caller
    arrival_s: float
    timeline: Timeline
    recovery: Recovery
    is_answered: bool = False  # accepted or rejected: not submitted again
    is_claim: bool = False  # the controller that had accepted it is gone
    num_statuses: int = -1  # of the controller, when it was submitted last
    first_token_s: float | None = None
    last_token_s: dict[int, float] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def num_tokens_to_compute(self) -> int:
        """Of the prompt and of the choices that run on, for an instance that has none of their KV."""
        running = (choice for choice in self.choices if choice.finish_reason is None)
        return len(self.request.prompt_ids) + sum(choice.num_tokens for choice in running)

    def resume(self, now_s: float, *, died: bool = False) -> None:
        """Begin the next attempt. RequestError if there were enough that brought nothing."""
        request_id = self.recovery.lose(sum(choice.num_tokens for choice in self.choices), now_s, died=died)
        self.request = msgspec.structs.replace(self.request, request_id=request_id)
        self.is_answered = self.is_claim = False
        for choice in self.choices:
            choice.restart()

    def claim(self, now_s: float) -> None:
        """It was accepted, and may run still: the controller is to say so."""
        self.is_answered, self.is_claim = False, True
        self.recovery.waits(now_s)

    def submit(self, frontend: str, controller: str) -> Submit:
        """The choices that run on, each with what is out of it; all of them, if nothing is."""
        choices = dict(enumerate(self.choices))
        output_ids = {i: choice.token_ids for i, choice in choices.items() if choice.finish_reason is None}
        if len(output_ids) == len(choices) and not any(output_ids.values()):
            output_ids = {}
        return Submit(frontend, self.request, output_ids, self.recovery.resumes, self.is_claim, controller)
