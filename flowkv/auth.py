"""The cluster's key: who holds it may send messages between nodes, nobody else gets a byte in or out.

Every member derives the same Curve25519 key pair from the key, and shows it on both ends of a connection (ZeroMQ's
CURVE: authenticated and encrypted). A client must know the public half to be understood at all, and prove that it
holds the secret half: libzmq asks a `Doorkeeper` about every client (ZAP, https://rfc.zeromq.org/spec/27).
"""

import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from flowkv.errors import ConfigError
from flowkv.throttle import Throttle

KEY_VARIABLE = "FLOWKV_CLUSTER_KEY"
MIN_KEY_CHARACTERS = 32
_SALT = b"flowkv cluster key, version 1"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # fixed by ZAP: one a context
_ZAP_DOMAIN = b"flowkv"
_WATCHED = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_WARNING_INTERVAL_S = 60.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """A key pair as ZeroMQ takes it (40 characters of Z85 each). Neither half is ever shown."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    @classmethod
    def derive(cls, text: str) -> "ClusterKey":
        """From what people share; slow on purpose, as somebody may have thought it up. ConfigError if it is short."""
        if len(text) < MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"the cluster key has {len(text)} characters, fewer than {MIN_KEY_CHARACTERS}: make one with flowkv key"
            )
        secret = z85.encode(hashlib.scrypt(text.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=32))
        return cls(zmq.curve_public(secret), secret)

    def open_to_members(self, socket: zmq.SyncSocket) -> None:
        """Before `bind`: whoever connects is asked for the key. Needs a `Doorkeeper` in the same context."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        socket.zap_domain = _ZAP_DOMAIN
        socket.zap_enforce_domain = True  # without a doorkeeper nobody gets in, rather than everybody

    def identify(self, socket: zmq.SyncSocket) -> None:
        """Before `connect`: show the key, and talk to a holder of it only."""
        socket.curve_serverkey = self.public
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret


def new_key() -> str:
    return secrets.token_urlsafe(32)


def read_key(path: Path | None, environ: Mapping[str, str]) -> ClusterKey | None:
    """From a file, else from the environment; None if neither is given. ConfigError for a key that protects nothing."""
    if path is not None:
        return ClusterKey.derive(_read_private(path.expanduser()))
    text = environ.get(KEY_VARIABLE, "").strip()
    return ClusterKey.derive(text) if text else None


def read_key_file(path: Path, kind: str) -> tuple[str, int]:
    """Its text, and its mode. ConfigError, naming the `kind` of file, where it cannot be read."""
    try:
        return path.read_text(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"the {kind} {path} cannot be read: {reason}") from None


def _read_private(path: Path) -> str:
    text, mode = read_key_file(path, "cluster key file")
    if mode & 0o077:
        raise ConfigError(f"the cluster key file {path} is open to other users: chmod 600 {path}")
    return text.strip()


class Doorkeeper:
    """A thread that admits holders of the key to one mailbox, and logs (once a minute at most) that others knocked."""

    def __init__(self, context: "zmq.Context[zmq.SyncSocket]", key: ClusterKey, mailbox: zmq.SyncSocket) -> None:
        self._allowed = z85.decode(key.public)
        self._zap = context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ZAP_ADDRESS)
        self._monitor = mailbox.get_monitor_socket(_WATCHED)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self.num_refused = 0  # connections; written by the thread alone
        self._throttle = Throttle(_WARNING_INTERVAL_S)
        self._handshaking: dict[int, None] = {}  # descriptors of connections, oldest first
        self._thread = threading.Thread(target=self._run, name="flowkv-doorkeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        self._monitor.close()
        self._zap.unbind(_ZAP_ADDRESS)  # at once: closing alone frees the address some time later
        self._zap.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._zap, self._monitor, self._stop):
            poller.register(source, zmq.POLLIN)
        while self._stop not in (ready := dict(poller.poll())):
            if self._zap in ready:
                self._answer()
            if self._monitor in ready:
                event = recv_monitor_message(self._monitor)
                self._watch(event["event"], event["value"])

    def _watch(self, event: int, descriptor: int) -> None:
        """Whatever a stranger speaks, his connection ends before it has shaken hands. libzmq does not say which just
        has; members take a moment: it is taken to be the youngest."""
        if event == zmq.EVENT_ACCEPTED:
            self._handshaking[descriptor] = None
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED and self._handshaking:
            self._handshaking.popitem()
        elif event == zmq.EVENT_DISCONNECTED and descriptor in self._handshaking:
            del self._handshaking[descriptor]
            self.num_refused += 1
            if (more := self._throttle.note("stranger", time.monotonic())) is not None:
                _logger.warning("turned away a connection that does not hold the cluster's key%s", more)

    def _answer(self) -> None:
        version, request, _domain, _address, _identity, mechanism, *credentials = self._zap.recv_multipart()
        is_member = mechanism == b"CURVE" and credentials == [self._allowed]
        status = [b"200", b"OK"] if is_member else [b"400", b"not a member"]
        self._zap.send_multipart([version, request, *status, b"", b""])
