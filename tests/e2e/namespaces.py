"""Two nodes on one machine: network namespaces joined by a veth pair (Linux, root, iproute2)."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Namespace:
    name: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """Before a command: run it in here."""
        return ["ip", "netns", "exec", self.name]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread connects to, and threads that it starts, is reached from in here."""
        with Path("/proc/thread-self/ns/net").open() as before, Path(f"/run/netns/{self.name}").open() as inside:
            _setns(inside.fileno())
            try:
                yield
            finally:
                _setns(before.fileno())

    def set_link(self, state: str) -> None:
        """`up` or `down`."""
        ip("-n", self.name, "link", "set", f"v{self.name}", state)


def ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"ip {' '.join(arguments)}: {result.stderr}"


@contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Gone at the end, come what may. Skips the test where they cannot be had, but never in CI."""
    reason = _why_not()
    if reason is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    number = os.getpid() % 2**16
    spaces = [
        Namespace(f"fk{os.getpid()}{side}", f"10.{number >> 8}.{number & 255}.{i + 1}") for i, side in enumerate("ab")
    ]
    with ExitStack() as stack:
        for space in spaces:
            ip("netns", "add", space.name)
            stack.callback(ip, "netns", "del", space.name)  # its interfaces go with it
        ip("link", "add", f"v{spaces[0].name}", "netns", spaces[0].name, "type", "veth", "peer", "name",
           f"v{spaces[1].name}", "netns", spaces[1].name)  # fmt: skip
        for space in spaces:
            ip("-n", space.name, "addr", "add", f"{space.address}/24", "dev", f"v{space.name}")
            ip("-n", space.name, "link", "set", "lo", "up")
            space.set_link("up")
        yield spaces[0], spaces[1]


def _why_not() -> str | None:
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (on Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"fk{os.getpid()}probe"
    result = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        return f"no network namespaces here: {result.stderr.strip()}"
    ip("netns", "del", name)
    return None


def _setns(fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
