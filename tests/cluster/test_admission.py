"""What does not fit is refused when it registers, with a reason that says which of the two is how."""

import msgspec
import pytest

from flowkv import __version__
from flowkv.cluster.admission import mismatch
from flowkv.cluster.fleet import Fleet
from flowkv.config import SchedulingConfig, SloConfig
from flowkv.messages import PeerInfo, Register
from flowkv.types import ModelInfo, PoolDescriptor, Role

MODEL = ModelInfo(name="m", dtype="float32", vocab_size=10, max_model_tokens=1000, fingerprint="f")
POOL = PoolDescriptor(
    node="one", layout_fingerprint="L", num_blocks=100, block_bytes=64, endpoints={"shm": b"", "nixl": b""}
)  # fmt: skip
FITS = Register(PeerInfo("decode-0@node-1", "a", POOL), Role.DECODE, MODEL, 16, 8, __version__, "epoch")


def refusal(register: Register, backend: str = "auto") -> str | None:
    there = msgspec.structs.replace(FITS, peer=PeerInfo("prefill-0", "p", POOL), role=Role.PREFILL)
    view = Fleet(SloConfig(), SchedulingConfig()).add(there)
    return mismatch(register, "epoch", MODEL, [view], backend)


def with_model(**changes: object) -> Register:
    return msgspec.structs.replace(FITS, model=msgspec.structs.replace(MODEL, **changes))


def with_pool(**changes: object) -> Register:
    peer = PeerInfo("decode-0@node-1", "a", msgspec.structs.replace(POOL, **changes))
    return msgspec.structs.replace(FITS, peer=peer)


def test_what_fits_is_taken() -> None:
    assert refusal(FITS) is None
    assert refusal(with_pool(node="two")) is None
    assert refusal(with_pool(num_blocks=7)) is None


@pytest.mark.parametrize(
    ("register", "reason"),
    [
        (msgspec.structs.replace(FITS, version="9.9"), "it runs FlowKV 9.9, this cluster"),
        (msgspec.structs.replace(FITS, epoch="x"), "for another cluster or an earlier one (epoch x, here epoch)"),
        (with_model(name="other"), "it serves the model other, the others m"),
        (with_model(dtype="bfloat16"), "it serves m in bfloat16, the others in float32"),
        (with_model(fingerprint="g"), "it serves other weights under the name m"),
        (with_model(max_model_tokens=2000), "it serves other weights under the name m"),
        (msgspec.structs.replace(FITS, block_size=32), "its blocks hold 32 tokens, those of prefill-0 16"),
        (with_pool(layout_fingerprint="X"), "it has another KV layout than prefill-0"),
        (with_pool(block_bytes=128), "it has another KV layout than prefill-0"),
        (with_pool(node="two", endpoints={"shm": b""}), "KV would move by nixl, which one of the two has not opened"),
        (with_pool(endpoints={"nixl": b""}), "KV would move by shm, which one of the two has not opened"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(register: Register, reason: str) -> None:
    text = refusal(register)
    assert text is not None and reason in text


def test_a_forced_backend_that_does_not_reach_is_refused() -> None:
    text = refusal(with_pool(node="two"), backend="shm")
    assert text is not None and "does not reach another node" in text
