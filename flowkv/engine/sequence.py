"""One stretch of tokens that an instance computes: a prompt, and then one choice of its continuation."""

from dataclasses import dataclass, field

from flowkv.engine.timing import Stamps
from flowkv.types import Request, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, how many of them are in the KV pool, and where.

    Before its first token is drawn a sequence stands for all `num_choices` of its request; then it is forked, and
    each fork stands for one. Preemption resets `num_computed` and drops `block_table`, nothing else: what a sequence
    is, is its ids.
    """

    request: Request
    frontend_address: str
    arrival: int  # order of arrival at this instance: the oldest start first, the youngest are preempted first;
    # below zero for those that go on after output elsewhere
    choice: int = 0
    num_choices: int = 1
    is_decoding: bool = False  # in the decode queue; otherwise its KV is still being computed
    has_begun: bool = False  # a chunk of it was scheduled, here or (its prompt is computed) elsewhere
    is_over: bool = False  # out of all queues for good; only its blocks may still be in use
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose KV is in the pool
    block_table: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    stamps: Stamps = field(default_factory=Stamps)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Ids of positions `start` to `stop` (exclusive), over prompt and output."""
        prompt_ids = self.request.prompt_ids
        if start >= len(prompt_ids):
            return self.output_ids[start - len(prompt_ids) : stop - len(prompt_ids)]
        if stop <= len(prompt_ids):
            return list(prompt_ids[start:stop])
        return list(prompt_ids[start:]) + self.output_ids[: stop - len(prompt_ids)]
