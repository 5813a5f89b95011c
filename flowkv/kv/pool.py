"""The memory that KV lives in: anonymous, shared between processes, gone with the last of them."""

import mmap
import os
from pathlib import Path

from flowkv.errors import PoolError


class KvPool:
    """`num_blocks * block_bytes` bytes behind a `memfd`, mapped into this process with every page present.

    Nothing of it has a name in the file system, so a killed process leaves nothing behind. Other processes map it
    through the descriptor `fd`, which they are sent over a Unix socket.
    """

    def __init__(self, fd: int, num_blocks: int, block_bytes: int) -> None:
        self.fd = fd
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._map = mmap.mmap(fd, num_blocks * block_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.buffer = memoryview(self._map)

    @classmethod
    def create(cls, num_blocks: int, block_bytes: int) -> "KvPool":
        """A new pool. PoolError if the machine has not that much memory to give: found out now, not at a write."""
        num_bytes = num_blocks * block_bytes
        available = available_memory_bytes()
        if num_bytes > available:
            raise PoolError(
                f"a KV pool of {num_bytes / 2**20:.0f} MiB does not fit into {available / 2**20:.0f} MiB of free "
                "memory; set a smaller engine.kv_memory"
            )
        fd = os.memfd_create("flowkv-pool", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return cls(fd, num_blocks, block_bytes)

    @classmethod
    def attach(cls, fd: int, num_blocks: int, block_bytes: int) -> "KvPool":
        """Map a peer's pool. PoolError if the descriptor is not as large as the peer says."""
        if (size := os.fstat(fd).st_size) != num_blocks * block_bytes:
            os.close(fd)
            raise PoolError(f"a peer's pool has {size} bytes where {num_blocks} x {block_bytes} were announced")
        return cls(fd, num_blocks, block_bytes)

    def close(self) -> None:
        """Unmap. Every view of `buffer` must be gone."""
        self.buffer.release()
        self._map.close()
        os.close(self.fd)


def available_memory_bytes() -> int:
    """What the machine, or the control group this process is in, still has to give."""
    available = int(_meminfo("MemAvailable")) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"])  # files that were read, such as weights: given back when it is needed
        available = min(available, int(text) - int(used.read_text()) + cached)
    return max(0, available)


def _meminfo(field: str) -> str:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return rest.split()[0]
    raise PoolError(f"/proc/meminfo has no {field}")
