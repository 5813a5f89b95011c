"""What a generation uses, counted while it comes."""

from collections import defaultdict

import msgspec

from flowkv.server.answers.envelope import CompletionTokensDetails, Usage
from flowkv.server.choice import Delta
from flowkv.server.reasoning.counter import NewCounter, NoThought, TokenCounter


class TokenMeter:
    """`usage` is always that of all tokens so far; thoughts are in it where there is a `new_counter` of them."""

    def __init__(self, num_prompt_tokens: int, new_counter: NewCounter | None = None) -> None:
        self.usage = Usage(num_prompt_tokens)
        if new_counter is not None:
            self.usage.completion_tokens_details = CompletionTokensDetails()
        self._counters: defaultdict[int, TokenCounter] = defaultdict(new_counter or NoThought)

    def count(self, delta: Delta) -> None:
        """Says in `delta` what belongs to the thought, too."""
        delta.num_thought_tokens = self._counters[delta.choice].count(delta.token_ids)
        self.usage.completion_tokens += len(delta.token_ids)
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        if self.usage.completion_tokens_details is not msgspec.UNSET:
            self.usage.completion_tokens_details.reasoning_tokens += delta.num_thought_tokens
