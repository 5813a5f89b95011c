"""What a step costs in the simulator: the truth that its controller and engines can only learn from.

A cost model is either analytic, a roofline over data sheets (`hardware`), or fitted to what `flowkv profile` measured.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from flowkv.errors import ConfigError
from flowkv.sim.hardware import ACCELERATORS, ELEMENT_BYTES, MODELS, Accelerator, Efficiency, ModelShape

MEMORY_FRACTION = 0.9  # of an accelerator's, for weights and KV together; vLLM's default for the same
PROFILE_FORMAT = "flowkv-profile-1"

_SHIPPED = {
    "llama-3.1-8b": ("a100", "h100", "l20", "h20"),
    "llama-3.1-70b": ("a100x4", "h100x4", "h20x4", "l20x8"),
}


class StepShape(NamedTuple):
    """All that a step's seconds depend on. A decode of `n` choices reads `decode_context_tokens` KV slots in all."""

    prefill_tokens: int
    prefill_pairs: int  # of a prompt token and a position that it attends to (`messages.StepSample`)
    decode_choices: int
    decode_context_tokens: int
    num_drawn: int  # rows of logits


class CostModel(Protocol):
    """Seconds of a step of one instance, and what its memory holds. Never negative, and the same for equal shapes."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def hardware(self) -> str: ...

    @property
    def max_model_tokens(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def block_bytes(self, block_size: int) -> int: ...

    def num_blocks(self, block_size: int) -> int:
        """Of a KV pool that takes the memory that is left."""
        ...

    def step_s(self, shape: StepShape) -> float: ...

    def repeated_s(self, decode_choices: int, decode_context_tokens: int, num_steps: int) -> NDArray[np.float64]:
        """Seconds [num_steps] of consecutive steps that only decode, each choice a token longer in each.

        Bit for bit what `step_s` says of each of them.
        """
        ...


class CostSummary(NamedTuple):
    name: str
    source: str  # of its figures


# --- analytic ------------------------------------------------------------------------------------------------------


class AnalyticCost:
    """A roofline (Williams et al., CACM 2009) for each kind of operator, added up.

    Matrices of the layers take the longer of their arithmetic and of reading them; so does the output matrix, for rows
    that are drawn from. Attention of prompts takes the longer of its arithmetic and of reading the KV that one chunk
    attends to, attention of decodes reads every slot once: with up to eight heads a KV head it is far below the ridge.
    Under tensor parallelism all work is divided by `num_accelerators`, and each layer ends in two ring all-reduces.
    """

    def __init__(
        self, model: ModelShape, accelerator: Accelerator, num_accelerators: int, efficiency: Efficiency | None = None
    ) -> None:
        """Raises ConfigError where the weights leave no room for KV."""
        suffix = f"x{num_accelerators}" if num_accelerators > 1 else ""
        self.hardware = accelerator.name + suffix
        self.model = model.name
        self.name = f"{self.model}/{self.hardware}"
        self.max_model_tokens = model.max_model_tokens
        self.vocab_size = model.vocab_size
        self._token_bytes = model.token_bytes
        memory_bytes = MEMORY_FRACTION * num_accelerators * accelerator.memory_bytes
        self._kv_bytes = int(memory_bytes) - ELEMENT_BYTES * model.num_parameters
        if self._kv_bytes <= 0:
            raise ConfigError(f"cost model {self.name}: the weights do not fit into {memory_bytes / 1e9:.0f} GB")
        self._set_seconds(model, accelerator, num_accelerators, efficiency or Efficiency())

    def block_bytes(self, block_size: int) -> int:
        return block_size * self._token_bytes

    def num_blocks(self, block_size: int) -> int:
        return self._kv_bytes // self.block_bytes(block_size)

    def step_s(self, shape: StepShape) -> float:
        seconds = self._tokens_s(shape.prefill_tokens + shape.decode_choices, shape.num_drawn)
        if shape.prefill_tokens:
            kv_s = shape.prefill_pairs / shape.prefill_tokens * self._slot_s
            seconds += max(shape.prefill_pairs * self._pair_s, kv_s)
        return seconds + shape.decode_context_tokens * self._slot_s

    def repeated_s(self, decode_choices: int, decode_context_tokens: int, num_steps: int) -> NDArray[np.float64]:
        contexts = _contexts(decode_choices, decode_context_tokens, num_steps)
        return self._tokens_s(decode_choices, decode_choices) + contexts * self._slot_s

    def _set_seconds(self, model: ModelShape, accelerator: Accelerator, num: int, efficiency: Efficiency) -> None:
        flops_per_s = num * accelerator.flops_per_s
        bytes_per_s = num * accelerator.bytes_per_s * efficiency.bandwidth
        compute_flops_per_s = flops_per_s * efficiency.compute
        self._layers_s = ELEMENT_BYTES * model.layer_parameters / bytes_per_s
        self._output_s = ELEMENT_BYTES * model.output_parameters / bytes_per_s
        self._token_s = 2 * model.layer_parameters / compute_flops_per_s
        self._row_s = 2 * model.output_parameters / compute_flops_per_s
        pair_flops = 4 * model.num_layers * model.num_heads * model.head_dim  # a product with K and one with V
        self._pair_s = pair_flops / (flops_per_s * efficiency.attention)
        self._slot_s = model.token_bytes / bytes_per_s
        self._fixed_s = efficiency.step_s
        self._reduced_token_s = 0.0
        if num > 1:
            num_reduces = 2 * model.num_layers
            sent_bytes = 2 * (num - 1) / num * model.hidden_size * ELEMENT_BYTES  # by each, in a ring
            self._reduced_token_s = num_reduces * sent_bytes / (accelerator.link_bytes_per_s * efficiency.link)
            self._fixed_s += num_reduces * accelerator.all_reduce_s

    def _tokens_s(self, num_tokens: int, num_drawn: int) -> float:
        """All but attention."""
        layers_s = max(num_tokens * self._token_s, self._layers_s)
        output_s = max(num_drawn * self._row_s, self._output_s) if num_drawn else 0.0
        return self._fixed_s + layers_s + output_s + num_tokens * self._reduced_token_s


def _contexts(decode_choices: int, decode_context_tokens: int, num_steps: int) -> NDArray[np.float64]:
    """KV slots read in each step. Whole numbers under 2**53, so floats are exact."""
    return decode_context_tokens + decode_choices * np.arange(num_steps, dtype=np.float64)


# --- fitted --------------------------------------------------------------------------------------------------------


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds by a count: straight lines between `counts`, which rise from 0 on, and the last of them from there on."""

    counts: list[int]
    seconds: list[float]

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.seconds) or len(self.counts) < 2:
            raise ValueError("a curve has as many counts as seconds, two or more")
        if self.counts[0] != 0 or any(b <= a for a, b in pairwise(self.counts)):
            raise ValueError("the counts of a curve rise from 0")
        if self.seconds[0] != 0 or any(b < a for a, b in pairwise(self.seconds)):
            raise ValueError("the seconds of a curve do not fall from 0")

    def at(self, count: int) -> float:
        i = min(max(bisect_left(self.counts, count), 1), len(self.counts) - 1)
        slope = (self.seconds[i] - self.seconds[i - 1]) / (self.counts[i] - self.counts[i - 1])
        return self.seconds[i - 1] + (count - self.counts[i - 1]) * slope


class Fit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of a step: `step_s` + prefill(tokens) + pairs * `pair_s` + decode(choices) + context * `slot_s` + rows *
    `row_s`."""

    step_s: float
    prefill: Curve
    pair_s: float
    decode: Curve
    slot_s: float
    row_s: float

    def __post_init__(self) -> None:
        if min(self.step_s, self.pair_s, self.slot_s, self.row_s) < 0:
            raise ValueError("seconds are not negative")


class LinkSpeeds(msgspec.Struct, frozen=True, kw_only=True):
    """Fields as in `config.SimulateConfig`."""

    link_bytes_per_s: float
    call_s: float
    message_s: float


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What `flowkv profile` writes and a simulation reads. Fields that are not named here are for people."""

    format: str
    model: str
    dtype: str
    hardware: str
    max_model_tokens: int
    vocab_size: int
    token_bytes: int
    kv_bytes: int  # of a pool as `engine.kv_memory = "auto"` would make it
    noise_fraction: float
    fit: Fit
    links: LinkSpeeds

    @property
    def overrides(self) -> dict[str, float]:
        """What a simulation of this machine is to be configured with, by key of `config.ClusterConfig`."""
        values = {"noise_fraction": self.noise_fraction, **msgspec.structs.asdict(self.links)}
        return {f"simulate.{key}": value for key, value in values.items()}

    def __post_init__(self) -> None:
        if min(self.max_model_tokens, self.vocab_size, self.token_bytes, self.kv_bytes) < 1:
            raise ValueError("sizes are positive")


@dataclass(frozen=True, slots=True)
class FittedCost:
    """A machine as it was measured."""

    profile: Profile
    name: str

    @property
    def model(self) -> str:
        return self.profile.model

    @property
    def hardware(self) -> str:
        return self.profile.hardware

    @property
    def max_model_tokens(self) -> int:
        return self.profile.max_model_tokens

    @property
    def vocab_size(self) -> int:
        return self.profile.vocab_size

    def block_bytes(self, block_size: int) -> int:
        return block_size * self.profile.token_bytes

    def num_blocks(self, block_size: int) -> int:
        return self.profile.kv_bytes // self.block_bytes(block_size)

    def step_s(self, shape: StepShape) -> float:
        fit = self.profile.fit
        seconds = self._decode_s(shape.decode_choices, shape.num_drawn)
        if shape.prefill_tokens:
            seconds += fit.prefill.at(shape.prefill_tokens) + shape.prefill_pairs * fit.pair_s
        return seconds + shape.decode_context_tokens * fit.slot_s

    def repeated_s(self, decode_choices: int, decode_context_tokens: int, num_steps: int) -> NDArray[np.float64]:
        contexts = _contexts(decode_choices, decode_context_tokens, num_steps)
        return self._decode_s(decode_choices, decode_choices) + contexts * self.profile.fit.slot_s

    def _decode_s(self, decode_choices: int, num_drawn: int) -> float:
        fit = self.profile.fit
        return fit.step_s + fit.decode.at(decode_choices) + num_drawn * fit.row_s


# --- by name -------------------------------------------------------------------------------------------------------


def cost_model(name: str, model: str | None = None, dtype: str | None = None) -> CostModel:
    """`MODEL/HARDWARE` of those shipped, or the path of a file that `flowkv profile` has written.

    With `model` or `dtype` a profile of another one is refused. ConfigError in one line, naming the file.
    """
    model_name, _, hardware = name.partition("/")
    if hardware in _SHIPPED.get(model_name, ()):
        return _analytic(model_name, hardware)
    path = Path(name)
    if not path.exists():
        known = ", ".join(summary.name for summary in list_cost_models())
        raise ConfigError(f"there is no cost model {name}: give the file of a profile, or one of {known}")
    profile = read_profile(path)
    for what, wanted, found in (("model", model, profile.model), ("dtype", dtype, profile.dtype)):
        if wanted is not None and wanted != found:
            raise ConfigError(f"{name}: a profile of {what} {found}, not {wanted}")
    return FittedCost(profile, name)


def list_cost_models() -> list[CostSummary]:
    """Those shipped, each with where its figures come from."""
    models = {model.name: model for model in MODELS}
    return [
        CostSummary(f"{name}/{hardware}", f"{_accelerator(hardware)[0].source}; {models[name].source}")
        for name, hardwares in _SHIPPED.items()
        for hardware in hardwares
    ]


def read_profile(path: Path) -> Profile:
    """ConfigError, in one line that names the file, for anything that is not a whole profile of this format."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a profile: {error}") from None
    if profile.format != PROFILE_FORMAT:
        raise ConfigError(f"{path}: a profile of format {profile.format!r}, not {PROFILE_FORMAT!r}: measure again")
    return profile


def _analytic(model_name: str, hardware: str) -> AnalyticCost:
    accelerator, num = _accelerator(hardware)
    return AnalyticCost(next(model for model in MODELS if model.name == model_name), accelerator, num)


def _accelerator(hardware: str) -> tuple[Accelerator, int]:
    name, _, num = hardware.partition("x")
    return next(accelerator for accelerator in ACCELERATORS if accelerator.name == name), int(num or 1)
