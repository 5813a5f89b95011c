"""Words shared by every part: roles, finish reasons, requests and what comes out of them. No behaviour beyond them."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import msgspec

NO_TOKEN = -1  # drawn where there is nothing to draw from
NO_WAY = -2  # drawn where that is so since a grammar has let no token through
GRAMMAR_ENDED = "the grammar is too complex to be followed any further, or min_tokens goes beyond its end"
DEFERRED = 2**31  # added to the priority of a request that will be late anyway, so that it makes no other late

# Checked where a message is decoded, so that no process computes with what another got wrong.
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # no NaN and no infinity either
NumChoices = Annotated[int, msgspec.Meta(ge=1, le=2**16)]

ATTEMPT_MARK = "~"  # in the id of a request that goes on after its instance was lost: cmpl-1-0, then cmpl-1-0~1
OutputIds = dict[int, list[TokenId]]  # by choice that runs: what it has put out so far


def attempt_id(request_id: str, attempt: int) -> str:
    """Of the `attempt`-th try at running the request whose first one has this id."""
    return f"{request_id}{ATTEMPT_MARK}{attempt}" if attempt else request_id


class Role(StrEnum):
    """An instance's preferred phase. It sets the order and the prefill budget of a step, never exclusion."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Regime(StrEnum):
    """What the cluster's load asks of its controller (FlowKV, Algorithm 1)."""

    NORMAL = "normal"
    IMBALANCED = "imbalanced"  # one phase waits while the other has slack: roles are flipped
    OVERLOADED = "overloaded"  # both phases wait: requests are refused, instances are added
    UNDERLOADED = "underloaded"  # fewer instances would do


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence or stop id (or, set by the frontend, a stop string)
    LENGTH = "length"  # max_tokens reached
    ABORT = "abort"  # the client went away or took the request back
    ERROR = "error"  # the instance that held the request failed


class GrammarKind(StrEnum):
    """What the text of a `Grammar` is."""

    JSON_OBJECT = "json_object"  # any JSON object; no text
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"  # a JSON list of strings, one of which is the answer
    GRAMMAR = "grammar"  # Lark's syntax, or GBNF


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What an output must be. Each instance compiles it from this text and finds its state from the output's ids.

    `lead` is Lark for what comes first, ending with the answer that is bound (`@answer`); empty: nothing does.
    """

    kind: GrammarKind
    text: str = ""
    lead: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are drawn, fully resolved: the frontend has filled in every default, the seed included.

    `stop_token_ids` already holds the model's end-of-sequence ids unless the client asked to ignore them;
    they are masked until `min_tokens` tokens are out. `top_k` 0 means all. `temperature` 0 means greedy.
    `logprobs` is the number of alternatives wanted beside the drawn token (0: the drawn token alone,
    None: nothing); `prompt_logprobs` the same for every prompt token but the first. `logit_bias` says by
    token id what is added to its logit. With a `grammar`, `stop_token_ids` holds the vocabulary's `end_ids` too: they
    may be drawn where the grammar is complete, even before `min_tokens` where nothing else may.
    """

    max_tokens: Count
    min_tokens: Count = 0
    n: NumChoices = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and how to continue it. Any instance can run it from this, and what it has put out so far, alone.

    The id is of one attempt (`attempt_id`): what an attempt that was given up still sends can reach no other. Among
    requests that wait, those of a lower `priority` go first; equal ones in the order of their arrival.
    """

    request_id: str
    prompt_ids: Sequence[TokenId]
    sampling: SamplingParams
    priority: int = 0

    @property
    def is_deferred(self) -> bool:
        return self.priority >= DEFERRED // 2

    @property
    def max_total_tokens(self) -> int:
        """Most tokens that one choice may come to hold, prompt included."""
        return len(self.prompt_ids) + self.sampling.max_tokens


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probability (natural, of the unscaled model distribution) of one token, and its best alternatives."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Timings(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """How long a request was in which stage on one instance, by the clock of that instance alone.

    In this order, each from the end of the one before it; 0 for one that was elsewhere. `reserved_s` and `transfer_s`
    run beside the prefill on another instance.
    """

    queued_s: float = 0.0  # until the step with its first chunk began
    prefill_s: float = 0.0  # until its prompt was computed
    reserved_s: float = 0.0  # blocks were kept for it, and none was filled yet, nor all on their way
    transfer_s: float = 0.0  # until all of its KV was here
    waiting_s: float = 0.0  # until its first step of decoding began
    decode_s: float = 0.0  # until this output


class Output(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """New tokens of one choice. Order is `index`, never arrival: P's first token has 0, D's first has 1.

    `prompt_logprobs` comes once, with the first output of choice 0; it has one entry for every prompt token but the
    first. `timings` come with the first and the last that an instance puts out of a choice, and with the first after
    it was preempted.
    """

    request_id: str
    choice: Count
    index: Count
    token_ids: list[TokenId]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    timings: Timings | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What every process must agree on about the model being served."""

    name: str
    dtype: str
    vocab_size: int
    max_model_tokens: int
    fingerprint: str = ""  # of configuration and weights, from samples of them


class PoolDescriptor(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer must know of a KV pool to write into it. Its owner alone has the pool itself (`kv.pool.KvPool`).

    `endpoints` says by name of a transfer backend how the pool is reached, in bytes that only that backend reads.
    """

    node: str  # equal for two pools that can be mapped by the same processes (`transfer.select.node_identity`)
    layout_fingerprint: str
    num_blocks: Size
    block_bytes: Size
    endpoints: dict[str, bytes]


class LinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One direction between two instances: what was written to `peer`, and by which backend."""

    peer: str
    backend: str
    num_bytes: int = 0
    num_calls: int = 0
    seconds: float = 0.0  # spent moving
    health: float = 1.0  # 1: no write failed lately; halved by each that does
    best_bytes_per_s: float = 0.0  # of one write: what the link has shown that it can do


class InstanceLoad(msgspec.Struct, frozen=True, kw_only=True):
    """An instance's own count of what it holds at one moment."""

    num_waiting: int = 0  # requests whose prefill has not started, preempted ones included
    num_preempted: int = 0  # of the waiting: those whose blocks were taken
    num_prefilling: int = 0
    num_decoding: int = 0  # choices in the decode queue
    num_sending: int = 0  # prefilled here, blocks held until the decode instance has them
    num_receiving: int = 0  # reserved here, not yet ready
    waiting_tokens: int = 0  # prompt tokens still to be computed, before those of a new request
    waiting_pairs: int = 0  # of these tokens and the positions that they attend to
    deferred_tokens: int = 0  # of requests that wait and let all others pass; not counted in the two above
    deferred_pairs: int = 0
    decode_context_tokens: int = 0  # KV slots that one step of the decode queue reads
    free_blocks: int = 0
    used_blocks: int = 0
    reserved_blocks: int = 0  # of the used: being filled by a peer
    quarantined_blocks: int = 0  # of the reserved: given up here, not acknowledged by the peer that may write them


class InstanceCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Totals since the instance started."""

    num_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    num_preemptions: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    sampling_seconds: float = 0.0
    transfer_bytes: int = 0
    transfer_calls: int = 0
    transfer_seconds: float = 0.0
    transfer_exposed_seconds: float = 0.0  # of these, after the last chunk was computed
    num_transfers: int = 0
    num_local_fallbacks: int = 0  # no decode instance had room: prefilled and decoded here
    num_moved_blocks: int = 0  # out of the way of reservations (EngineConfig.max_segments)
    num_expired_leases: int = 0  # reservations given up because the peer that was to fill them fell silent


class RollingRestart(msgspec.Struct, frozen=True):
    """Of the one under way, or the last one: whose turn it is (nobody's: empty) and what of it, `draining` or
    `starting`. `token` names what was asked last, `failure` says why it was given up."""

    token: str = ""
    instance: str = ""
    phase: str = ""
    num_done: int = 0
    num_left: int = 0  # after this one
    failure: str = ""


class ProcessUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What one process takes of its machine."""

    resident_bytes: int  # the KV pool included
    open_files: int
    cpu_seconds: float
    num_restarts: int = 0  # of the processes that were in its place before it


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One instance as the controller sees it; what `/metrics` and `/ready` are made of."""

    name: str
    role: Role
    num_blocks: int
    block_size: int
    load: InstanceLoad
    counters: InstanceCounters
    links: list[LinkStatus] = []
    is_stalled: bool = False  # nothing has been heard of it for too long; it gets no requests
    is_draining: bool = False  # it finishes what it has and then ends; it gets no requests
    num_flips: int = 0  # of its role, since it registered
