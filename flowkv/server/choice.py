"""One choice of a request: its outputs put in order, and turned into text up to where it ends."""

from dataclasses import dataclass, field

from flowkv.server.text.detokenizer import Detokenizer
from flowkv.server.text.stop_strings import StopStrings
from flowkv.types import FinishReason, Output, TokenLogprobs

FAILURES = (FinishReason.ABORT, FinishReason.ERROR)


@dataclass(slots=True)
class Delta:
    """What is new in one choice. `token_ids` and `logprobs` may run ahead of `text`, which can be held back."""

    choice: int  # counted over all prompts of the HTTP request
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_thought_tokens: int = 0  # that are known, with this, to belong to the thought; earlier ones may be among them
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop id or stop string that ended it
    error: str | None = None

    @property
    def num_bytes(self) -> int:
        """Of memory, about."""
        entries = self.logprobs if self.prompt_logprobs is None else [*self.logprobs, *self.prompt_logprobs]
        num_alternatives = sum(len(entry.top) for entry in entries)
        return 400 + len(self.text) + 40 * len(self.token_ids) + 120 * (len(entries) + num_alternatives)


@dataclass(slots=True)
class Choice:
    number: int
    detokenizer: Detokenizer
    stops: StopStrings
    min_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)  # all that are out
    finish_reason: FinishReason | None = None
    _held: dict[int, Output] = field(default_factory=dict)

    def accept(self, output: Output) -> Delta | None:
        """An output in any order; tokens that are out already are skipped. None where nothing is new."""
        if self.finish_reason is not None:
            return None
        if output.finish_reason in FAILURES:
            return self.end(output.finish_reason, output.error)
        if output.index > self.num_tokens:
            self._held[output.index] = output
            return None
        delta = Delta(self.number)
        following: Output | None = output
        while following is not None and self.finish_reason is None:
            self._apply(following, delta)
            following = self._held.pop(self.num_tokens, None)
        is_new = delta.token_ids or delta.finish_reason is not None or delta.prompt_logprobs is not None
        return delta if is_new else None

    def end(self, reason: FinishReason, error: str | None = None) -> Delta:
        """Now, whatever is still on its way."""
        self.finish_reason = reason
        text = self.stops.push(self.detokenizer.flush()) + self.stops.flush()
        return Delta(self.number, text, finish_reason=reason, error=error)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def has_gap(self) -> bool:
        """Something has come that follows what has not."""
        return bool(self._held)

    def restart(self) -> None:
        """A new attempt goes on after the tokens that are out; what the old one sent ahead is not waited for."""
        self._held.clear()

    def _apply(self, output: Output, delta: Delta) -> None:
        if output.prompt_logprobs is not None:
            delta.prompt_logprobs = output.prompt_logprobs
        skipped = self.num_tokens - output.index
        for position in range(skipped, len(output.token_ids)):
            self._append(output, position, delta)
            if self.stops.matched is not None:
                self._finish(delta, FinishReason.STOP, self.stops.matched)
                return
        if output.finish_reason is not None:
            self._flush(delta)
            stopped = self.stops.matched
            if stopped is not None:
                self._finish(delta, FinishReason.STOP, stopped)
            else:
                self._finish(delta, output.finish_reason, output.stop_token_id)

    def _append(self, output: Output, position: int, delta: Delta) -> None:
        token_id = output.token_ids[position]
        self.token_ids.append(token_id)
        delta.token_ids.append(token_id)
        if output.logprobs is not None:
            delta.logprobs.append(output.logprobs[position])
        is_last = position == len(output.token_ids) - 1
        if is_last and token_id == output.stop_token_id and not self.stops.include_stop:
            return
        delta.text += self._checked(self.detokenizer.push(token_id))

    def _checked(self, piece: str) -> str:
        """Stop strings count from the token after `min_tokens` on, as stop ids do."""
        return self.stops.push(piece) if self.num_tokens > self.min_tokens else piece

    def _flush(self, delta: Delta) -> None:
        delta.text += self._checked(self.detokenizer.flush())
        delta.text += self.stops.flush()

    def _finish(self, delta: Delta, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.finish_reason = delta.finish_reason = reason
        delta.stop_reason = stop_reason
