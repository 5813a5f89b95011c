"""Models and accelerators that the simulator knows by name, as their authors and makers state them.

Speeds are of dense bfloat16 arithmetic (data sheets also print twice that, for sparse matrices). What software gets out
of them is `Efficiency`'s business.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How much of a data sheet's speed reaches a step, and what each step costs beside.

    `compute` 0.6: the best matrix products alone reach 0.79 of an H100's peak (780 TFLOP/s, H. He's measurement of
    2024, of shapes chosen for it); a step also has norms, rotations, activations and gaps between kernels, and chunks
    whose tiles do not come out even. `attention` 0.5: FlashAttention-2 reaches up to 0.73 on an A100 (arXiv 2307.08691,
    section 4) and 0.35 on an H100, FlashAttention-3 up to 0.75 there (arXiv 2407.08608, abstract), both for long
    prompts in one piece; over a block table and in chunks it is less. `bandwidth` 0.8: streams of many megabytes reach
    about 0.9 of a data sheet's (0.9 from 100 MB on, 0.75 at 10 MB in Calculon's A100 80 GB description), and a layer's
    matrices have tens of megabytes. `link` 0.65 of an all-reduce's is Calculon's too.
    `step_s`, of scheduling, launching graphs and drawing, is assumed: it differs more between servers than the rest.
    """

    compute: float = 0.6
    attention: float = 0.5
    bandwidth: float = 0.8
    link: float = 0.65
    step_s: float = 1e-3


@dataclass(frozen=True, slots=True)
class Accelerator:
    name: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float  # to the others of its node, one way
    all_reduce_s: float  # of one without bytes: launch and synchronisation
    source: str


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of the Llama family in bfloat16; its embedding and its output matrix are two."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_tokens: int
    source: str

    @property
    def layer_parameters(self) -> int:
        """Of all layers: what every token is multiplied with."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def output_parameters(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """But for the norms, which are under a thousandth."""
        return self.layer_parameters + 2 * self.output_parameters

    @property
    def token_bytes(self) -> int:
        """KV of one token, all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * ELEMENT_BYTES


ELEMENT_BYTES = 2  # of bfloat16

MODELS = (
    ModelShape(
        "llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, 131072,
        "config.json of meta-llama/Llama-3.1-8B; The Llama 3 Herd of Models, table 3",
    ),
    ModelShape(
        "llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256, 131072,
        "config.json of meta-llama/Llama-3.1-70B; The Llama 3 Herd of Models, table 3",
    ),
)  # fmt: skip

ACCELERATORS = (
    Accelerator(
        "a100", 312e12, 2.039e12, 80e9, 300e9, 10e-6,
        "NVIDIA A100 datasheet, A100 80GB SXM: 312 TFLOPS BF16, 2,039 GB/s, NVLink 600 GB/s both ways",
    ),
    Accelerator(
        "h100", 989.4e12, 3.35e12, 80e9, 450e9, 10e-6,
        "NVIDIA H100 datasheet, H100 SXM: 1,979 TFLOPS BF16 with sparsity, 3.35 TB/s, NVLink 900 GB/s both ways",
    ),
    Accelerator(
        "l20", 119.5e12, 864e9, 48e9, 32e9, 25e-6,
        "NVIDIA L20 product brief: 119.5 TFLOPS BF16, 48 GB GDDR6 at 864 GB/s, PCIe 4.0 x16 and no NVLink",
    ),
    Accelerator(
        "h20", 148e12, 4.0e12, 96e9, 450e9, 10e-6,
        "NVIDIA H20 product brief: 148 TFLOPS BF16, 96 GB HBM3 at 4.0 TB/s, NVLink 900 GB/s both ways",
    ),
)  # fmt: skip
