"""An instance whose model takes the time it is told: `python -m benchmarks.transfer.paced OPTIONS`.

Everything but the forward pass is the real thing: the loop of `engine.process`, its engine, its transport, its mailbox.
"""

import sys
import time
from pathlib import Path

import msgspec
import numba
import numpy as np

from benchmarks.spawn import exit_on_sigterm
from benchmarks.transfer.geometry import LLAMA_8B
from flowkv.config import ClusterConfig, EngineConfig, TransferConfig
from flowkv.engine.batch import Batch, BatchItem, BatchResult, Draw, ItemResult
from flowkv.engine.process import InstanceSpec, _Instance
from flowkv.kv.layout import KvLayout
from flowkv.kv.pool import KvPool
from flowkv.types import ModelInfo, Role
from flowkv.wire import Outbox, SyncContext

TOKEN = 65  # what every draw yields
CHUNK_TOKENS = 512
SPIN_PREFIX = "spin"  # of the ids of requests whose prefill keeps its core busy
_SPIN_SLICE_S = 1e-4


class Options(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    role: Role
    backend: str
    folder: str
    conductor: str  # the mailbox of controller, frontend and launcher
    num_blocks: int
    prefill_tokens_per_s: float
    decode_step_s: float
    layout: KvLayout = LLAMA_8B

    @property
    def address(self) -> str:
        return f"ipc://{self.folder}/{self.name}"


class PacedModel:
    """The shape of a model, without one."""

    def __init__(self, options: Options) -> None:
        self.layout = options.layout
        self.info = ModelInfo(name="paced", dtype=options.layout.dtype, vocab_size=128, max_model_tokens=2**15)
        self._options = options

    def runner(self, pool: KvPool) -> "PacedRunner":
        self._pool = np.frombuffer(pool.buffer, np.uint8)  # as a model's tensors would, this keeps it mapped
        self._pool[:] = 1
        return PacedRunner(self._options.prefill_tokens_per_s, self._options.decode_step_s)


class PacedRunner:
    """Prompt tokens at a rate, and a decode step of a fixed length on top where something decodes."""

    def __init__(self, prefill_tokens_per_s: float, decode_step_s: float) -> None:
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._decode_step_s = decode_step_s
        self._spins_per_slice = _spins_in(_SPIN_SLICE_S)

    def run(self, batch: Batch) -> BatchResult:
        started_s = time.monotonic()
        seconds = self.seconds(batch)
        if any(item.sequence.request.request_id.startswith(SPIN_PREFIX) for item in batch.items):
            while time.monotonic() < started_s + seconds:
                _spin(self._spins_per_slice)
        else:
            time.sleep(seconds)
        items = [ItemResult([Draw(TOKEN) for _ in item.draws]) for item in batch.items]
        return BatchResult(batch.batch_id, items, forward_seconds=time.monotonic() - started_s)

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """There is nothing in them."""

    def seconds(self, batch: Batch) -> float:
        """How long a step with this batch takes."""
        num_prompt_tokens = sum(item.num_tokens for item in batch.items if not _is_decode(item))
        decode_s = self._decode_step_s if any(map(_is_decode, batch.items)) else 0.0
        return num_prompt_tokens / self._prefill_tokens_per_s + decode_s


def _is_decode(item: BatchItem) -> bool:
    return item.start >= len(item.sequence.request.prompt_ids)


@numba.njit(nogil=True)
def _spin(count: int) -> int:
    """Keep a core busy without the GIL, as a forward pass does."""
    state = 1
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFF
    return state


def _spins_in(seconds: float) -> int:
    _spin(1)  # compiles
    started_s, count = time.monotonic(), 1_000_000
    _spin(count)
    return max(1, int(count * seconds / (time.monotonic() - started_s)))


class _PacedInstance(_Instance):
    def __init__(self, options: Options, spec: InstanceSpec, context: SyncContext, outbox: Outbox) -> None:
        self._options = options
        super().__init__(spec, context, outbox)

    def _load(self) -> PacedModel:
        self._model = PacedModel(self._options)
        return self._model


def _spec(options: Options) -> InstanceSpec:
    engine = EngineConfig(
        block_size=options.layout.block_size,
        kv_memory=options.num_blocks * options.layout.block_bytes,
        max_batch_tokens=CHUNK_TOKENS,
    )
    return InstanceSpec(
        name=options.name,
        role=options.role,
        config=ClusterConfig(toy=True, engine=engine, transfer=TransferConfig(backend=options.backend)),
        model_folder=None,
        model_name="paced",
        threads=1,
        address=options.address,
        pool_address=str(Path(options.folder) / f"{options.name}.pool"),
        controller_address=options.conductor,
        launcher_address=options.conductor,
        epoch="benchmark",
    )


def main(options_text: str) -> None:
    exit_on_sigterm()
    options = msgspec.json.decode(options_text, type=Options)
    context = SyncContext()
    outbox = Outbox(context)
    instance = _PacedInstance(options, _spec(options), context, outbox)
    try:
        instance.run()
    finally:
        instance.close()
        outbox.close()
        context.term()


if __name__ == "__main__":
    main(*sys.argv[1:])
