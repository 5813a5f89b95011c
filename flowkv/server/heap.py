"""What a frontend's allocator keeps of the bodies that it has read."""

import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h
_LARGE_BYTES = 256 * 1024
_MAX_ARENAS = 2


def give_large_blocks_back() -> None:
    """At the start of a process. Large blocks come from the kernel and return to it when they are freed.

    Otherwise glibc raises the size that counts as large to the largest that was ever freed, and each thread has a heap
    of its own: a few large bodies then stay resident for good. An allocator that is not glibc's is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_ARENA_MAX, _MAX_ARENAS)
