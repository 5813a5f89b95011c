"""A real model as an instance process sees it. Imported (and preloaded) only where one is served."""

from collections.abc import Callable
from pathlib import Path

import torch

from flowkv.config import ClusterConfig
from flowkv.engine.runner import TorchRunner
from flowkv.errors import GrammarError, ModelError
from flowkv.grammar.matchers import Matchers
from flowkv.grammar.vocabulary import Vocabulary
from flowkv.kv.pool import KvPool
from flowkv.model.fingerprint import weights_fingerprint
from flowkv.model.loading import Trust, load_model
from flowkv.types import ModelInfo


class TorchModel:
    """Weights in memory, and the facts that the rest of the cluster needs of them."""

    def __init__(
        self, folder: Path, name: str, config: ClusterConfig, threads: int, on_progress: Callable[[float, str], None]
    ) -> None:
        torch.set_num_threads(threads)
        trust = Trust(config.trust_remote_code, config.allow_pickled_weights)
        self._loaded = load_model(
            folder, config.dtype, config.device, on_progress, may_fuse=config.engine.fused, trust=trust
        )
        self.layout = self._loaded.layout(config.engine.block_size)
        self.info = ModelInfo(
            name=name,
            dtype=self._loaded.dtype,
            vocab_size=self._loaded.vocab_size,
            max_model_tokens=self._loaded.max_model_tokens,
            fingerprint=weights_fingerprint(folder),
        )
        self._matchers = Matchers(_vocabulary(folder, self._loaded.vocab_size), config.engine.max_choices)

    def runner(self, pool: KvPool) -> TorchRunner:
        return TorchRunner(self._loaded, self.layout, pool.buffer, pool.num_blocks, self._matchers)


def _vocabulary(folder: Path, vocab_size: int) -> Vocabulary | None:
    """None where no grammar can bind the model, of which the frontend tells those who ask for one."""
    try:
        return Vocabulary.of_folder(folder, vocab_size)
    except (GrammarError, ModelError):
        return None
