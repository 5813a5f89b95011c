"""Addresses of nodes: what people give, as numbers, and checked before anything starts."""

import errno
import ipaddress
import itertools
import socket

from flowkv.config import parse_endpoint
from flowkv.errors import ConfigError
from flowkv.transfer.select import boot_and_namespaces, digest


def resolve_endpoint(text: str) -> tuple[str, int]:
    """(numeric host, port) of `HOST[:PORT]`. ConfigError if it cannot be read or the host has no address."""
    try:
        host, port = parse_endpoint(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return resolve_host(host), port


def resolve_host(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"the host {host!r} has no address: {error}") from None


def check_local(host: str) -> None:
    """ConfigError unless other nodes can reach this one at the numeric `host`."""
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        raise ConfigError(f"{host} says nothing to other nodes: give the address by which they reach this one")
    try:
        with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, which must be an address of this node: {error.strerror}") from None


def source_address(host: str, port: int) -> str:
    """This node's address on the way to `host`. Nothing is sent. ConfigError if there is no way."""
    try:
        with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"this node has no route to {host}: {error.strerror}") from None


def take_place(controller_address: str) -> tuple[socket.socket, str]:
    """A place in a cluster for one launcher of this node (`messages.Join`), and its name.

    It is a name in the abstract namespace of Unix sockets, which has one holder in a network namespace, and which the
    kernel frees with the last process that has the socket, however that ends. Its number comes after what tells one
    network namespace from all others: of this boot of this machine.
    """
    prefix = f"flowkv-{digest(boot_and_namespaces('net'), controller_address)}"
    for number in itertools.count():
        name = f"{prefix}-{number}"
        place = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            place.bind(f"\0{name}")
        except OSError as error:
            place.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return place, name
    raise AssertionError("unreachable")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
