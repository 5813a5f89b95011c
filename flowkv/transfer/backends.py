"""The names of the transfer backends, and which of them joins two pools."""

from flowkv.errors import TransferError
from flowkv.types import PoolDescriptor

SHM, NIXL = "shm", "nixl"


def choose_backend(mine: PoolDescriptor, theirs: PoolDescriptor, forced: str) -> str:
    """Shared memory within a node and NIXL between nodes, unless `forced` names one (`TransferConfig.backend`).

    TransferError, with what to do about it, where the two pools cannot be joined.
    """
    is_same_node = mine.node == theirs.node
    wanted = forced if forced != "auto" else SHM if is_same_node else NIXL
    if wanted == SHM and not is_same_node:
        raise TransferError("shared memory does not reach another node: set transfer.backend to auto or nixl")
    for pool in (mine, theirs):
        if wanted not in pool.endpoints:
            raise TransferError(
                f"KV would move by {wanted}, which one of the two has not opened: instances on several nodes need "
                "pip install 'flowkv[nixl]' on each of them, and flowkv serve --listen"
            )
    return wanted


def may_outlive_writer(backend: str | None, pool: PoolDescriptor) -> bool:
    """Whether bytes written by a process may land after its death: those that a network still carries.

    `backend` is that of the link with the owner of `pool`, None where this side has not seen it come up.
    """
    return backend == NIXL or (backend is None and NIXL in pool.endpoints)
