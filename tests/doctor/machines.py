from dataclasses import replace
from typing import Any

from flowkv.doctor.machine import Machine

GOOD = Machine(
    kernel="6.1", architecture="x86_64", cpu_flags=frozenset({"avx2", "avx512_bf16"}), num_cores=8, cpu_quota=None,
    available_bytes=2**34, memory_limit_bytes=None, max_files=2**16, max_files_hard=2**20, memlock_bytes=None,
    max_processes=None, run_folder="/tmp", pools_work=True, pidfds_work=True, huge_page_mode="advise",
    is_clock_synchronised=True, gpus=(), rdma_devices=(),
)  # fmt: skip


def machine(**changed: Any) -> Machine:
    """One on which everything is fine, but for what is `changed`."""
    return replace(GOOD, **changed)
