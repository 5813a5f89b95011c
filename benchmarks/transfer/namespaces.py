"""Two network namespaces joined by a veth pair: two nodes as far as TCP can tell. Needs root and `ip`."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import BenchmarkError

ADDRESSES = ("10.97.31.1", "10.97.31.2")


class NoNamespacesError(BenchmarkError):
    """This machine does not let us make them, and why."""


class Namespaces(NamedTuple):
    """`prefixes` come before a command to run it in the first or the second; `addresses` are theirs."""

    prefixes: tuple[list[str], list[str]]
    addresses: tuple[str, str]


@contextlib.contextmanager
def joined() -> Iterator[Namespaces]:
    """NoNamespacesError where this machine does not let us."""
    names = tuple(f"flowkv-{os.getpid()}-{side}" for side in "ab")
    links = tuple(f"fkv{os.getpid() % 10**6}{side}" for side in "ab")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in (link, "lo"):
                _ip("-n", name, "link", "set", device, "up")
        prefixes = (["ip", "netns", "exec", names[0]], ["ip", "netns", "exec", names[1]])
        yield Namespaces(prefixes, ADDRESSES)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoNamespacesError("network namespaces need the program `ip` (iproute2)") from error
    if done.returncode:
        raise NoNamespacesError(f"no network namespaces here (are you root?): {done.stderr.strip()}")
