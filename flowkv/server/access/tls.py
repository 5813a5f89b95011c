"""HTTPS: the certificate of the server. When its files change, new connections get the new one."""

import logging
import ssl
from pathlib import Path

from flowkv.config import ServerConfig
from flowkv.errors import ConfigError

_logger = logging.getLogger(__name__)


class Certificate:
    def __init__(self, cert: Path, key: Path) -> None:
        """ConfigError where the two cannot be used, or others can read the key."""
        self._cert, self._key = cert, key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._state = self._look()
        self._load(self.context)

    @classmethod
    def of(cls, config: ServerConfig) -> "Certificate | None":
        if config.tls_cert_file is None or config.tls_key_file is None:
            return None
        return cls(Path(config.tls_cert_file).expanduser(), Path(config.tls_key_file).expanduser())

    def refresh(self) -> None:
        """If the files have changed and fit. Renewals write one after the other: the next look finds both."""
        if (state := self._look()) == self._state:
            return
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # what does not fit must not spoil the one in use
            self._load(self.context)
        except ConfigError as error:
            _logger.error("%s; the certificate that was read before stays", error)
        self._state = state

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            if self._key.stat().st_mode & 0o007:
                raise ConfigError(f"the TLS key {self._key} is open to all users here: chmod 600 {self._key}")
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except OSError as error:  # SSLError is one
            reason = error.strerror or str(error)
            raise ConfigError(f"the TLS certificate {self._cert} and key {self._key} do not do: {reason}") from None

    def _look(self) -> tuple[tuple[int, int], ...]:
        """What changes when the files do."""
        try:
            stats = [path.stat() for path in (self._cert, self._key)]
        except OSError:
            return ()
        return tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats)


def _no_password() -> str:
    """Asked for where the key is encrypted; a server that starts by itself has nobody to ask."""
    raise ConfigError("the TLS key is encrypted: give server.tls_key_file one that is not, in a file of mode 600")
