import pytest

from flowkv.kv.layout import KvLayout


def test_sizes_of_llama_3_1_8b() -> None:
    layout = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
    assert layout.token_bytes == 131_072
    assert layout.block_bytes == 2 * 2**20
    assert layout.num_blocks_for(17) == 2


def test_the_fingerprint_tells_what_cannot_be_exchanged() -> None:
    fingerprints = {
        KvLayout(2, 2, 32, 16, "float32").fingerprint,
        KvLayout(2, 2, 32, 16, "bfloat16").fingerprint,
        KvLayout(2, 2, 32, 32, "float32").fingerprint,
        KvLayout(2, 4, 16, 16, "float32").fingerprint,
    }
    assert len(fingerprints) == 4
    assert KvLayout(2, 2, 32, 16, "float32").fingerprint in fingerprints


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="'int3'"):
        KvLayout(1, 1, 1, 1, "int3")
