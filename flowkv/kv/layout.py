"""The shape of a KV pool, as data (DESIGN: block-major, all layers of a block in one piece)."""

import hashlib
from dataclasses import dataclass

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A pool `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]` (the paper's (B, L, 2, H), section 3).

    Only the kernels that read and write KV look inside a block; allocation, transfer and messages know
    `block_bytes` and `fingerprint`.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"unknown KV dtype {self.dtype!r}; one of {', '.join(ELEMENT_BYTES)}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim, self.block_size) < 1:
            raise ValueError(f"every extent of a KV layout is at least 1: {self}")

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """KV of one token, all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.token_bytes

    @property
    def fingerprint(self) -> str:
        """Equal on two instances exactly when a block of one can be read by the other."""
        text = f"B,L,2,S,H,D {self.block_shape} {self.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
