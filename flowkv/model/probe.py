"""Watching a loaded model before it serves: every attention call it makes, and its numbers against its own attention.

The first pass records: under the name `PROBE_NAME` both an attention function and a mask function are registered, so
that it is known, for every layer, which mask the model means, and that our attention, which makes no masks, does the
same. The second compares logits with those of the model's own `eager` attention over whole prompts; it runs in chunks
and single tokens, two sequences to a batch, so that hidden state or a mix-up between sequences shows as well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flowkv.errors import ModelError
from flowkv.model.attention import ATTENTION_NAME, Model
from flowkv.model.packing import pack
from flowkv.model.support import refuse

PROBE_NAME = "flowkv_probe"
MASK_FUNCTION = "flowkv_mask_function"
NEUTRAL_KEYWORDS = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache_position",
        "dropout",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "output_router_logits",
    }
)
READ_KEYWORDS = frozenset({"scaling", "sliding_window", "softcap", "is_causal"})
MEANINGS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias by position",
    "indices": "a selection of tokens",
}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of the logits' norm, per position

# of batch, head, query and key index
MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What one layer keeps of a token, twice: K and V."""

    num_kv_heads: int
    head_dim: int


@dataclass(slots=True)
class Recorder:
    """Collects the attention calls of one forward pass; raises `ModelError` at the first that ours could not do."""

    name: str
    max_tokens: int
    layers: dict[int, Geometry] = field(default_factory=dict)

    def record(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        keywords: dict[str, Any],
    ) -> None:
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer in self.layers:
            raise refuse(self.name, f"layer {layer} computes attention more than once, or without a layer number")
        if not query.shape[-1] == key.shape[-1] == value.shape[-1] or query.shape[1] % key.shape[1]:
            raise refuse(self.name, "its queries, keys and values have heads of different sizes (latent attention)")
        self.check_keywords(module, keywords)
        self.check_mask(mask, keywords.get("sliding_window"))
        self.layers[layer] = Geometry(key.shape[1], key.shape[-1])

    def check_keywords(self, module: torch.nn.Module, keywords: dict[str, Any]) -> None:
        for keyword in sorted(set(keywords) - NEUTRAL_KEYWORDS - READ_KEYWORDS):
            if keywords[keyword] is not None:
                meaning = MEANINGS.get(keyword, "a feature that FlowKV does not know")
                raise refuse(self.name, f"its attention is given `{keyword}`, {meaning}")
        causal = keywords.get("is_causal")
        if causal is False or (causal is None and getattr(module, "is_causal", True) is False):
            raise refuse(self.name, "its attention is not causal")

    def check_mask(self, mask: torch.Tensor | None, window: int | None) -> None:
        function: MaskFunction | None = getattr(mask, MASK_FUNCTION, None)
        if function is None:
            raise refuse(self.name, "it makes its attention masks itself, and FlowKV cannot tell what they hide")
        for query, key in mask_samples(self.max_tokens, window):
            expected = key <= query and (window is None or key > query - window)
            if mask_allows(self.name, function, query, key) != expected:
                raise refuse(self.name, "its attention mask is not plainly causal (chunked, prefix or bidirectional)")


def mask_samples(max_tokens: int, window: int | None) -> Iterator[tuple[int, int]]:
    """(query, key) positions at which two masks of different kinds would differ."""
    last = max_tokens - 1
    edges = [0, 1, 2, 5, *(1 << power for power in range(3, 31)), last]
    if window is not None:
        edges += [window - 1, window, window + 1, 2 * window + 1]
    for query in sorted({edge for edge in edges if 0 <= edge <= last}):
        keys = {0, query // 2, query - 1, query, query + 1}
        if window is not None:
            keys |= {query - window - 1, query - window, query - window + 1}
        yield from ((query, key) for key in sorted(keys) if 0 <= key <= last)


def mask_allows(name: str, function: MaskFunction, query: int, key: int) -> bool:
    try:
        return bool(function(*torch.tensor([0, 0, query, key]).unbind()))
    except IndexError as error:
        raise refuse(name, "its attention mask depends on the tokens of the prompt") from error


def recording_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flowkv_recorder: Recorder,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    flowkv_recorder.record(module, query, key, value, attention_mask, keywords)
    return torch.zeros_like(query).transpose(1, 2), None


def recording_mask(*, q_length: int, kv_length: int, mask_function: MaskFunction, **ignored: Any) -> torch.Tensor:
    """A mask that only carries its function to the attention calls that are given it."""
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool)
    setattr(mask, MASK_FUNCTION, mask_function)
    return mask


AttentionInterface.register(PROBE_NAME, recording_attention)
AttentionMaskInterface.register(PROBE_NAME, recording_mask)


@contextmanager
def attention_set_to(model: PreTrainedModel, name: str) -> Iterator[None]:
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


@torch.inference_mode()
def watch(model: PreTrainedModel, max_tokens: int) -> tuple[int, Geometry]:
    """The number of layers and what each keeps. ModelError if our attention would not do what the model means."""
    name = str(model.config.model_type)
    recorder = Recorder(name, max_tokens)
    token_ids = random_ids(model, 6)[None]
    with attention_set_to(model, PROBE_NAME):
        try:
            model(
                input_ids=token_ids,
                position_ids=torch.arange(6, device=token_ids.device)[None],
                use_cache=False,
                flowkv_recorder=recorder,
            )
        except TypeError as error:
            raise refuse(name, f"it does not hand keywords on to its attention ({error})") from error
    expected = int(model.config.get_text_config().num_hidden_layers)
    if sorted(recorder.layers) != list(range(expected)):
        raise refuse(name, f"{len(recorder.layers)} of its {expected} layers go through the attention interface")
    shapes = set(recorder.layers.values())
    if len(shapes) > 1:
        raise refuse(name, "its layers keep keys and values of different shapes")
    return expected, shapes.pop()


def random_ids(model: PreTrainedModel, count: int) -> torch.Tensor:
    vocab_size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, vocab_size, (count,), generator=generator).to(model.device)


Expected = tuple[torch.Tensor, torch.Tensor]  # token ids and float32 logits of every position

CHECK_LENGTHS = (14, 10)
CHECK_STEPS = (((0, 6), (0, 7)), ((6, 11), (7, 8)), ((11, 12), (8, 9)), ((12, 13), (9, 10)), ((13, 14),))
CHECK_BLOCK_SIZE = 4
CHECK_TABLES = ([6, 1, 4, 2], [0, 5, 3])


@torch.inference_mode()
def expected_logits(model: PreTrainedModel) -> list[Expected]:
    """Of two sequences, by the model's own attention."""
    sequences = [random_ids(model, length) for length in CHECK_LENGTHS]
    with attention_set_to(model, "eager"):
        return [(ids, model(input_ids=ids[None], use_cache=False).logits[0].float()) for ids in sequences]


@torch.inference_mode()
def compare(
    ours: Model, expected: list[Expected], num_layers: int, geometry: Geometry, dtype: torch.dtype, name: str
) -> None:
    """ModelError unless logits through the pool equal those of the model's own attention."""
    computed = run_in_steps(ours, [ids for ids, _ in expected], num_layers, geometry, dtype)
    tolerance = TOLERANCE[dtype]
    for found, (_, right) in zip(computed, expected, strict=True):
        error = ((found - right).norm(dim=-1) / right.norm(dim=-1)).max().item()
        if not error <= tolerance:
            raise ModelError(
                f"FlowKV cannot serve {name}: its logits differ from those of the model's own "
                f"attention by {error:.2g} of their size (at most {tolerance:g} in {dtype})."
            )


def run_in_steps(
    ours: Model, sequences: list[torch.Tensor], num_layers: int, geometry: Geometry, dtype: torch.dtype
) -> list[torch.Tensor]:
    """float32 logits of every position of each sequence, computed by `CHECK_STEPS` over a small pool."""
    shape = (7, num_layers, 2, CHECK_BLOCK_SIZE, geometry.num_kv_heads, geometry.head_dim)
    forward = ours.over(torch.zeros(shape, dtype=dtype, device=sequences[0].device))
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for spans in CHECK_STEPS:
        counts = [stop - start for start, stop in spans]
        tables = CHECK_TABLES[: len(spans)]
        batch = pack([start for start, _ in spans], counts, tables, CHECK_BLOCK_SIZE)
        token_ids = torch.cat([ids[start:stop] for ids, (start, stop) in zip(sequences, spans, strict=False)])
        rows = torch.arange(batch.num_tokens, device=token_ids.device)
        parts = torch.split(forward(batch, token_ids, rows).float(), counts)
        for collected, part in zip(logits, parts, strict=False):
            collected.append(part)
    return [torch.cat(parts) for parts in logits]
