"""The facts of this machine that FlowKV depends on."""

import ctypes
import mmap
import os
import platform
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flowkv.errors import PoolError
from flowkv.kv.pool import KvPool, available_memory_bytes

_CGROUP = Path("/sys/fs/cgroup")
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 512  # struct timex is smaller


@dataclass(frozen=True, kw_only=True)
class Machine:
    """None: this machine does not say."""

    kernel: str
    architecture: str
    cpu_flags: frozenset[str]
    num_cores: int  # that this process may run on
    cpu_quota: float | None  # cores' worth of time that the control group gets; None: no limit
    available_bytes: int
    memory_limit_bytes: int | None  # of the control group
    max_files: int  # open at once, of one process, as it is; the hard limit is how far it can be raised
    max_files_hard: int
    memlock_bytes: int | None  # that may be locked; None: any amount
    max_processes: int | None  # of the control group
    run_folder: str  # where the folder with the sockets goes
    pools_work: bool  # memfd_create and a shared mapping of it
    pidfds_work: bool
    huge_page_mode: str | None  # for shared memory
    is_clock_synchronised: bool | None
    gpus: tuple[str, ...]
    rdma_devices: tuple[str, ...]


def look_at_machine() -> Machine:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Machine(
        kernel=platform.release(),
        architecture=platform.machine(),
        cpu_flags=_cpu_flags(),
        num_cores=len(os.sched_getaffinity(0)),
        cpu_quota=parse_cpu_max(_read(_CGROUP / "cpu.max")),
        available_bytes=available_memory_bytes(),
        memory_limit_bytes=_limit(_CGROUP / "memory.max"),
        max_files=_or_many(soft),
        max_files_hard=_or_many(hard),
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        max_processes=_limit(_CGROUP / "pids.max"),
        run_folder=tempfile.gettempdir(),
        pools_work=_pools_work(),
        pidfds_work=_pidfds_work(),
        huge_page_mode=chosen(_read(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))),
        is_clock_synchronised=_is_clock_synchronised(),
        gpus=_gpus(),
        rdma_devices=_names(Path("/sys/class/infiniband")),
    )


def parse_cpu_max(text: str | None) -> float | None:
    """`cpu.max` of a control group: "max 100000", or microseconds of so many."""
    if text is None:
        return None
    quota, _, period = text.partition(" ")
    return None if quota == "max" else int(quota) / int(period or 100_000)


def chosen(text: str | None) -> str | None:
    """The word in brackets of "always within_size [never]"."""
    if text is None or "[" not in text:
        return None
    return text.partition("[")[2].partition("]")[0]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _limit(path: Path) -> int | None:
    text = _read(path)
    return None if text is None or text == "max" else int(text)


def _or_many(limit: int) -> int:
    return 2**31 if limit == resource.RLIM_INFINITY else limit


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ()


def _cpu_flags() -> frozenset[str]:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _pools_work() -> bool:
    try:
        KvPool.create(1, mmap.PAGESIZE).close()
    except (OSError, PoolError):
        return False
    return True


def _pidfds_work() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _is_clock_synchronised() -> bool | None:
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # of zeros: change nothing, only tell
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    return None if state < 0 else state != _TIME_ERROR


def _gpus() -> tuple[str, ...]:
    """By their device files: nothing is loaded to ask them."""
    nvidia = tuple(name for name in _names(Path("/dev")) if name.startswith("nvidia") and name[6:].isdigit())
    return nvidia + (("kfd",) if Path("/dev/kfd").exists() else ())
