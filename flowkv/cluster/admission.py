"""Who may join a cluster: said at registration, with a reason, and never found out by a request."""

from collections.abc import Iterable

from flowkv import __version__
from flowkv.cluster.load import InstanceView
from flowkv.errors import TransferError
from flowkv.messages import Register
from flowkv.transfer.backends import choose_backend
from flowkv.types import ModelInfo


def mismatch(
    message: Register, epoch: str, model: ModelInfo | None, views: Iterable[InstanceView], backend: str
) -> str | None:
    """Why an instance does not belong here, or why KV cannot pass between it and those that do."""
    if message.version != __version__:
        return f"it runs FlowKV {message.version}, this cluster {__version__}"
    if message.epoch != epoch:
        return f"it was started for another cluster or an earlier one (epoch {message.epoch}, here {epoch})"
    if model is not None and (reason := _model_mismatch(message.model, model)) is not None:
        return reason
    return next((reason for view in views if (reason := _pool_mismatch(message, view, backend))), None)


def _model_mismatch(model: ModelInfo, others: ModelInfo) -> str | None:
    if model == others:
        return None
    if model.name != others.name:
        return f"it serves the model {model.name}, the others {others.name}"
    if model.dtype != others.dtype:
        return f"it serves {model.name} in {model.dtype}, the others in {others.dtype}"
    return f"it serves other weights under the name {model.name}"


def _pool_mismatch(message: Register, view: InstanceView, backend: str) -> str | None:
    mine, theirs = message.peer.pool, view.peer.pool
    if message.block_size != view.block_size:
        return f"its blocks hold {message.block_size} tokens, those of {view.name} {view.block_size}"
    if (mine.layout_fingerprint, mine.block_bytes) != (theirs.layout_fingerprint, theirs.block_bytes):
        return f"it has another KV layout than {view.name}"
    try:
        choose_backend(mine, theirs, backend)
    except TransferError as error:
        return str(error)
    return None
