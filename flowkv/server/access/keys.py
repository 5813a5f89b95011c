"""API keys: who holds which, kept as hashes.

A key is 256 random bits that nobody has thought up, so one round of SHA-256 hides it: there is nothing to guess, and
scrypt or PBKDF2, which slow guessing down, would only cost every request tens of milliseconds.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flowkv.auth import read_key_file
from flowkv.errors import ConfigError

MIN_KEY_CHARACTERS = 32
_PREFIX = "fk-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH_MARK = "sha256:"
_HASH = re.compile(r"[0-9a-f]{64}")
_OPTIONS = ("concurrent", "requests_per_minute", "tokens_per_minute", "priority")
_MAX_PRIORITY = 2**20
_CHECK_INTERVAL_S = 1.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`limits` has fields of `quotas.QuotaLimits`, where they differ from those of every key; `priority` is added to
    that of every request."""

    name: str
    digest: bytes = field(repr=False)
    limits: Mapping[str, int] = field(default_factory=dict)
    priority: int = 0


ANYBODY = ApiKey("anybody", b"")  # where no key is asked for


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def key_line(name: str, key: str) -> str:
    """For a key file. ConfigError for a name that cannot be."""
    _check_name(name, "")
    return f"{name}:{_HASH_MARK}{digest_of(key).hex()}"


def add_key(path: Path, name: str) -> str:
    """A new key, whose hash is now in the file (made with mode 0600 if there was none). ConfigError if it cannot be."""
    if path.exists() and any(key.name == name for key in read_file(path)):
        raise ConfigError(f"{path} has a key named {name} already: choose another name, or remove its line")
    key = new_key()
    line = key_line(name, key)
    try:
        path.touch(mode=0o600)
        text = path.read_bytes()
        lead = "\n" if text and not text.endswith(b"\n") else ""
        with path.open("ab", buffering=0) as file:  # one write: a server that reads meanwhile sees no half of it
            file.write(f"{lead}{line}\n".encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    return key


def read_file(path: Path) -> list[ApiKey]:
    """`NAME:sha256:HASH [option=value ...]` a line, with or without `sha256:`; `#` begins a comment. ConfigError names
    the line that is broken."""
    content, mode = read_key_file(path, "key file")
    if mode & 0o022:
        raise ConfigError(f"others may write to the key file {path}: chmod 600 {path}")
    keys = [
        _parse(text, f"{path}, line {number}: ", may_be_plain=False)
        for number, line in enumerate(content.splitlines(), 1)
        if (text := line.partition("#")[0].strip())
    ]
    return _distinct(keys, f"{path}: ")


def read_variable(variable: str, text: str) -> list[ApiKey]:
    """The same, separated by commas or new lines; what has no `sha256:` before it is the key itself."""
    entries = [entry for part in re.split(r"[,\n]", text) if (entry := part.strip())]
    keys = [_parse(entry, f"{variable}, entry {n}: ", may_be_plain=True) for n, entry in enumerate(entries, 1)]
    return _distinct(keys, f"{variable}: ")


class KeyRing:
    """The keys that open something. A file that changes is read again: a key is added or revoked without a restart."""

    def __init__(self, fixed: Iterable[ApiKey], path: Path | None = None) -> None:
        """ConfigError for a file that cannot be used, and where there is no key at all."""
        self._fixed = list(fixed)
        self._path = path
        self._state = self._look()
        self._check_due_s = float("-inf")
        self._keys = self._read()
        if not self._keys:
            raise ConfigError(f"{path} holds no key: make one with flowkv api-key NAME --file {path}")

    @classmethod
    def of(cls, path: str | None, variable: str, environ: Mapping[str, str]) -> "KeyRing | None":
        """From a file, the environment or both; None where neither is given."""
        fixed = read_variable(variable, environ.get(variable, ""))
        return cls(fixed, None if path is None else Path(path).expanduser()) if fixed or path is not None else None

    def find(self, key: str, now_s: float) -> ApiKey | None:
        """Whose it is. All are compared, each in constant time: how long it takes says nothing about any."""
        self._refresh(now_s)
        digest = digest_of(key)
        found: ApiKey | None = None
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found

    def _refresh(self, now_s: float) -> None:
        if self._path is None or now_s < self._check_due_s:
            return
        self._check_due_s = now_s + _CHECK_INTERVAL_S
        if (state := self._look()) == self._state:
            return
        self._state = state
        try:
            if not self._path.read_bytes().strip():  # as while an editor writes it
                raise ConfigError(f"{self._path} is empty (to revoke the last key, leave a comment)")
            self._keys = self._read()
        except OSError as error:
            _logger.error("%s cannot be read: %s; the keys that were read before stay", self._path, error.strerror)
        except ConfigError as error:
            _logger.error("%s; the keys that were read before stay as they were", error)
        else:
            _logger.warning("%s has changed: %d keys", self._path, len(self._keys))

    def _read(self) -> list[ApiKey]:
        keys = self._fixed + (read_file(self._path) if self._path is not None else [])
        return _distinct(keys, "the key file and the environment together: ")

    def _look(self) -> tuple[int, int, int] | None:
        """What changes when the file does; None while it is not there."""
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _parse(text: str, where: str, *, may_be_plain: bool) -> ApiKey:
    entry, *options = text.split()
    name, _, value = entry.partition(":")
    _check_name(name, where)
    is_marked = value.startswith(_HASH_MARK)
    digest = _HASH.fullmatch(value.removeprefix(_HASH_MARK))
    if digest is None and (is_marked or not may_be_plain):
        raise ConfigError(f"{where}{name}: is not followed by a hash: make the line with flowkv api-key {name}")
    is_key = may_be_plain and not is_marked
    if is_key and len(value) < MIN_KEY_CHARACTERS:
        raise ConfigError(f"{where}the key of {name} has fewer than {MIN_KEY_CHARACTERS} characters: flowkv api-key")
    limits, priority = _options(options, where)
    return ApiKey(name, digest_of(value) if is_key or digest is None else bytes.fromhex(digest[0]), limits, priority)


def _options(options: list[str], where: str) -> tuple[dict[str, int], int]:
    values: dict[str, int] = {}
    for option in options:
        name, _, text = option.partition("=")
        if name not in _OPTIONS:
            raise ConfigError(f"{where}{option!r}: an option is one of {', '.join(_OPTIONS)}, with a value")
        try:
            values[name] = int(text)
        except ValueError:
            raise ConfigError(f"{where}{option!r}: the value is a whole number") from None
        if abs(values[name]) > _MAX_PRIORITY if name == "priority" else values[name] < 0:
            raise ConfigError(f"{where}{option!r}: the value is out of range")
    priority = values.pop("priority", 0)
    return values, priority


def _check_name(name: str, where: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{where}a key's name is letters, digits, '.', '_', '@' and '-', 64 at most, not {name!r}")


def _distinct(keys: list[ApiKey], where: str) -> list[ApiKey]:
    """Limits and metrics go by name."""
    names = [key.name for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}two keys are named {name}")
    return keys
