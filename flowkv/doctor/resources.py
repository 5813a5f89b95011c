"""Cores, memory and limits of this machine against what a configuration asks for."""

import os

from flowkv.config import ClusterConfig, parse_bytes
from flowkv.doctor.finding import Finding, fail, ok, warn
from flowkv.doctor.machine import Machine
from flowkv.wire import MAX_IPC_PATH_BYTES

_FEW_FILES, _ENOUGH_FILES = 512, 4096  # a connection of a client is one
_TIGHT = 0.85  # of the free memory
_PROCESSES_AND_THREADS = 64  # of one instance, about: processes of a control group are its threads too
_SOCKET_NAME_BYTES = len("/flowkv-12345678/prefill-100~100.pool")


def cores(config: ClusterConfig, machine: Machine) -> Finding:
    """Computing threads of all instances, and one core for everything else."""
    num_instances = _num_instances(config)
    usable = machine.num_cores if machine.cpu_quota is None else min(machine.num_cores, machine.cpu_quota)
    threads = config.engine.threads or max(1, (machine.num_cores - 1) // num_instances)
    text = f"{num_instances} x {threads} computing threads on {usable:g} cores"
    if usable < machine.num_cores and not config.engine.threads:
        text += f" ({machine.num_cores} are visible, the control group's quota is {usable:g})"
        return warn("cores", text, f"--threads {max(1, int(usable - 1) // num_instances)}")
    if threads * num_instances > usable:
        advice = "fewer instances, or more cores: threads that share a core make every step wait"
        if config.engine.threads > 1:
            advice = f"--threads {max(1, int(usable) // num_instances)}, or " + advice
        return warn("cores", text, advice)
    return ok("cores", text)


def memory(config: ClusterConfig, machine: Machine, weights_bytes: int) -> Finding:
    """KV pools, every page of which is taken at the start, and weights, a copy an instance."""
    num_instances = len(config.roles)
    pool_bytes = parse_bytes(config.engine.kv_memory)
    wanted = num_instances * (weights_bytes + (pool_bytes or 0))
    pools = "pools made to fit" if pool_bytes is None else f"{num_instances} pools of {_size(pool_bytes)}"
    text = f"{pools}, {num_instances} x {_size(weights_bytes)} of weights, {_size(machine.available_bytes)} free"
    if machine.memory_limit_bytes is not None:
        text += f" (the control group's limit is {_size(machine.memory_limit_bytes)})"
    if wanted > machine.available_bytes:
        return fail("memory", text, "a smaller --kv-memory, fewer instances, or a smaller model")
    if wanted > _TIGHT * machine.available_bytes:
        return warn("memory", text, "leave some for activations and the rest of the machine: a smaller --kv-memory")
    return ok("memory", text)


def shared_memory(machine: Machine) -> Finding:
    """Pools are anonymous files: neither the size of /dev/shm nor its rights matter."""
    if not machine.pools_work:
        advice = "let the sandbox or seccomp profile of this container permit memfd_create, and leave some memory free"
        return fail("shared memory", "no memory that processes can share (memfd_create, mmap)", advice)
    return ok("shared memory", "memfd_create and shared mappings work; /dev/shm is not used")


def locked_memory(config: ClusterConfig, machine: Machine) -> Finding:
    """RDMA pins what it moves. Shared memory and TCP do not."""
    limit = "unlimited" if machine.memlock_bytes is None else _size(machine.memlock_bytes)
    if machine.rdma_devices and _is_networked(config) and machine.memlock_bytes is not None:
        text = f"{limit} may be locked, and {', '.join(machine.rdma_devices)} pins the KV pool"
        return warn("locked memory", text, "ulimit -l unlimited (LimitMEMLOCK=infinity; --ulimit memlock=-1)")
    return ok("locked memory", f"{limit}; only RDMA needs any")


def open_files(machine: Machine) -> Finding:
    text = f"{machine.max_files} may be open at once in one process"
    if machine.max_files >= _ENOUGH_FILES:
        return ok("open files", text)
    advice = f"ulimit -n {max(_ENOUGH_FILES, min(65536, machine.max_files_hard))}: every open connection is one"
    return (fail if machine.max_files < _FEW_FILES else warn)("open files", text, advice)


def processes(config: ClusterConfig, machine: Machine) -> Finding:
    if machine.max_processes is None:
        return ok("processes", "as many as wanted")
    text = f"{machine.max_processes} processes and threads in this control group"
    if machine.max_processes < _PROCESSES_AND_THREADS * (_num_instances(config) + 2):
        return warn("processes", text, "a higher pids.max (docker: --pids-limit)")
    return ok("processes", text)


def run_folder(machine: Machine) -> Finding:
    """Where the sockets between the processes of this node go."""
    folder = machine.run_folder
    longest = len(folder.encode()) + _SOCKET_NAME_BYTES
    if longest > MAX_IPC_PATH_BYTES:
        text = f"{folder} is too long a path for a Unix socket"
        return fail("run folder", text, "TMPDIR=/tmp, or another short one")
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail("run folder", f"{folder} cannot be written to", "set TMPDIR to a folder that can")
    return ok("run folder", f"{folder}/flowkv-*, for nobody else")


def kernel(machine: Machine) -> Finding:
    if not machine.pidfds_work:
        advice = "Linux 5.4 or newer, and a seccomp profile that permits pidfd_open: deaths are seen by it"
        return fail("kernel", f"Linux {machine.kernel} has no pidfd", advice)
    return ok("kernel", f"Linux {machine.kernel}, with pidfd")


def huge_pages(machine: Machine) -> Finding:
    """A pool in huge pages costs fewer misses of the TLB; it works as well without."""
    mode = machine.huge_page_mode
    if mode in ("always", "within_size", "force", "advise"):
        return ok("huge pages", f"transparent huge pages of shared memory: {mode}")
    return ok("huge pages", "shared memory is in pages of 4 KiB (shmem_enabled is off), which costs little")


def instructions(config: ClusterConfig, machine: Machine) -> Finding:
    flags = machine.cpu_flags
    if machine.architecture != "x86_64":
        return ok("instructions", f"{machine.architecture}: the model's products are torch's own")
    if "avx512_bf16" in flags:
        return ok("instructions", "AVX512-BF16: products of bfloat16 run on FlowKV's own kernels")
    if "avx2" not in flags:
        return warn("instructions", "no AVX2: every product is slow here", "a newer machine, or CPU flags passed on")
    if config.dtype == "bfloat16":
        return warn("instructions", "no AVX512-BF16: bfloat16 is emulated", "--dtype float32")
    return ok("instructions", "AVX2, no AVX512-BF16: products run on oneDNN; --dtype float32 may be quicker")


def _num_instances(config: ClusterConfig) -> int:
    return max(1, len(config.roles), config.scheduling.max_instances)


def _is_networked(config: ClusterConfig) -> bool:
    return config.network.listen is not None or config.transfer.backend == "nixl"


def _size(num_bytes: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.{int(power == 30)}f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"
