"""What is installed, and what the hardware beside the CPU is good for."""

import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from flowkv import __version__
from flowkv.config import ClusterConfig
from flowkv.doctor.finding import Finding, fail, ok, warn
from flowkv.doctor.machine import Machine
from flowkv.errors import ConfigError
from flowkv.transfer.backends import NIXL

_DEVELOPERS = "dev"
_EXTRA = re.compile(r"""^([\w.-]+).*;.*extra\s*==\s*["']([\w-]+)["']""")


def versions() -> Finding:
    names = ("torch", "transformers", "pyzmq", "msgspec")
    text = ", ".join(f"{name} {version(name)}" for name in names)
    return ok("versions", f"FlowKV {__version__} on Python {platform.python_version()}: {text}")


def extras(requirements: Iterable[str] | None = None, find: Callable[[str], str] = version) -> Finding:
    """`requirements` as in the metadata of a package; those of this one if None."""
    known: dict[str, bool] = {}
    for requirement in requirements if requirements is not None else _own_requirements():
        if (match := _EXTRA.match(requirement)) is not None and match[2] != _DEVELOPERS:
            known[match[2]] = known.get(match[2], True) and _is_there(match[1], find)
    there = [name for name, is_there in known.items() if is_there]
    absent = [name for name, is_there in known.items() if not is_there]
    text = f"{', '.join(there) or 'none'} installed"
    return ok("extras", text + (f"; not: {', '.join(absent)} (pip install 'flowkv[{absent[0]}]')" if absent else ""))


def _own_requirements() -> list[str]:
    try:
        return requires("flowkv") or []
    except PackageNotFoundError:  # a checkout that was never installed
        return []


def _is_there(name: str, find: Callable[[str], str]) -> bool:
    try:
        find(name)
    except PackageNotFoundError:
        return False
    return True


def nixl(config: ClusterConfig, machine: Machine) -> Iterator[Finding]:
    """Opened only where this configuration would open it: it takes a second."""
    is_needed = config.network.listen is not None or config.transfer.backend == NIXL
    if not is_needed:
        is_there = importlib.util.find_spec("nixl") is not None
        yield ok("NIXL", f"{'installed' if is_there else 'not installed'}; one node alone does not need it")
        return
    yield open_nixl()
    transports = os.environ.get("UCX_TLS")
    if transports is not None and not {"tcp", "all", "rc", "ud", "dc", "ib"} & set(re.split(r"[,^]", transports)):
        yield warn("UCX", f"UCX_TLS={transports} names no transport between nodes", "add tcp, or unset it")
    else:
        wires = f"RDMA over {', '.join(machine.rdma_devices)}" if machine.rdma_devices else "TCP (no RDMA device here)"
        devices = os.environ.get("UCX_NET_DEVICES", "any")
        yield ok("UCX", f"{wires}; UCX_TLS={transports or 'all'}, UCX_NET_DEVICES={devices}")


def open_nixl() -> Finding:
    from flowkv.transfer.nixl_agent import Nixl  # an extra

    try:
        Nixl().open_writing("flowkv-doctor")
    except ConfigError as error:
        return fail("NIXL", str(error), "pip install 'flowkv[nixl]' on every node; leave UCX_TLS unset")
    return ok("NIXL", "opens, over UCX")


def gpu(machine: Machine) -> Finding:
    seen = f"{len(machine.gpus)} visible ({', '.join(machine.gpus)})" if machine.gpus else "none visible"
    return ok("GPU", f"{seen}; this version computes on the CPU alone")
