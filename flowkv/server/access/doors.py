"""Who may call what: decided from the head of an HTTP request alone.

    path                                      who
    health, readiness (`server.open_paths`)   anybody
    /v1 and everything else                   holders of an API key, where there are any
    operators' pages: /metrics, /cluster ...  holders of the admin key; else as below
    /admin                                    holders of the admin key; else as below

Without an API key and an admin key everything is open to programs on this machine, and only to them: the server listens
on a loopback address, and a `Host` or an `Origin` that is not this machine's means that a web page in a browser here is
asking (DNS rebinding, cross-site requests). In every other case what has no key of its own is shut.
"""

import base64
import binascii
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from flowkv.config import ServerConfig
from flowkv.errors import ConfigError, RequestError
from flowkv.server.access.keys import ANYBODY, MIN_KEY_CHARACTERS, ApiKey, KeyRing, digest_of

API_KEYS_VARIABLE = "FLOWKV_API_KEYS"
ADMIN_KEY_VARIABLE = "FLOWKV_ADMIN_KEY"
OPERATOR = ApiKey("operator", b"")
OPERATORS_PAGES = ("/metrics", "/cluster", "/dashboard", "/requests", "/debug")
ADMIN_PATH = "/admin"
_BAD_PATH = re.compile(r"[\x00-\x1f\x7f\\]|(^|/)\.\.?(/|$)")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_OFF = (
    f"this is for operators only: give the server an admin key (--admin-key-file or {ADMIN_KEY_VARIABLE}) or a port of "
    "their own (--admin-port)"
)


class Audience(Enum):
    """For whom a path is."""

    EVERYBODY = auto()
    CLIENTS = auto()
    OPERATORS = auto()
    ADMINS = auto()


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of an HTTP request before its body is read. `path` is decoded, header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


class Unauthorized(RequestError):
    """`challenge` goes into `WWW-Authenticate`."""

    def __init__(self, message: str, code: str, challenge: str) -> None:
        super().__init__(message, status=401, code=code)
        self.challenge = challenge


class Door(Protocol):
    def admit(self, call: Call, now_s: float) -> ApiKey:
        """Whose call it is. Raises `RequestError` (401 or 403) for one that may not come in."""
        ...


class OpenDoor:
    def admit(self, call: Call, now_s: float) -> ApiKey:
        return ANYBODY


@dataclass(frozen=True, slots=True)
class ShutDoor:
    reason: str

    def admit(self, call: Call, now_s: float) -> ApiKey:
        raise RequestError(f"{call.path}: {self.reason}", status=403, code="shut")


@dataclass(frozen=True, slots=True)
class KeyDoor:
    """`Authorization: Bearer KEY`; for browsers, where `takes_password`, also Basic with the key as password."""

    ring: KeyRing
    takes_password: bool = False

    def admit(self, call: Call, now_s: float) -> ApiKey:
        scheme, _, value = call.headers.get("authorization", "").partition(" ")
        key = value.strip()
        if self.takes_password and scheme.lower() == "basic":
            key = _password(key)
            check_origin(call, ())  # a browser adds the password by itself, whoever makes it call
        elif scheme.lower() != "bearer":
            raise self._unauthorized("there is no key: send Authorization: Bearer KEY", "missing_api_key")
        if (found := self.ring.find(key, now_s)) is None:
            raise self._unauthorized("the key is not one of this server's", "invalid_api_key")
        return found

    def _unauthorized(self, reason: str, code: str) -> Unauthorized:
        return Unauthorized(reason, code, 'Basic realm="flowkv"' if self.takes_password else 'Bearer realm="flowkv"')


@dataclass(frozen=True, slots=True)
class LocalDoor:
    """For programs of this machine without a key. `names` are what `Host` may say, beside names of loopback addresses;
    None: whatever it likes, as nothing is known of who can reach this server. `origins` are web pages that may call."""

    names: frozenset[str] | None
    origins: tuple[str, ...] = ()
    caller: ApiKey = ANYBODY

    def admit(self, call: Call, now_s: float) -> ApiKey:
        host = call.headers.get("host", "")
        name = host_name(host)
        if self.names is not None and host and not is_loopback(name) and name not in self.names:
            reason = f"the Host {host[:100]!r} is not a name of this server: add it to server.allowed_hosts if it is"
            raise RequestError(reason, status=403, code="forbidden_host")
        check_origin(call, self.origins)
        return self.caller


class Access:
    """One listener's doors."""

    def __init__(self, clients: Door, operators: Door, admins: Door, open_paths: Iterable[str]) -> None:
        self._doors: dict[Audience, Door] = {
            Audience.EVERYBODY: OpenDoor(),
            Audience.CLIENTS: clients,
            Audience.OPERATORS: operators,
            Audience.ADMINS: admins,
        }
        self._open_paths = frozenset(open_paths)

    def admit(self, call: Call, now_s: float) -> ApiKey:
        """Whose call it is. Raises `RequestError` (400, 401 or 403), with the reason as its `code`."""
        if _BAD_PATH.search(call.path):
            raise RequestError("the path has segments or characters that no path here has", code="bad_path")
        return self._doors[self.audience(call.path)].admit(call, now_s)

    def audience(self, path: str) -> Audience:
        if path in self._open_paths:
            return Audience.EVERYBODY
        if _is_under(path, ADMIN_PATH):
            return Audience.ADMINS
        return Audience.OPERATORS if any(_is_under(path, page) for page in OPERATORS_PAGES) else Audience.CLIENTS


def access_of(config: ServerConfig, environ: Mapping[str, str]) -> tuple[Access, Access]:
    """Of the server's port and of `server.admin_port`. ConfigError where strangers could come in."""
    api = KeyRing.of(config.api_key_file, API_KEYS_VARIABLE, environ)
    admin = _admin_ring(config, environ)
    _check_exposure(config, api, admin)
    here = LocalDoor(frozenset({config.host.lower()}), caller=OPERATOR)
    anybody = LocalDoor(_names(config), config.cors_origins)
    if config.admin_port is not None:
        operators: Door = ShutDoor("this is served at server.admin_port")
        admins = operators
    elif admin is not None:
        operators = admins = KeyDoor(admin, takes_password=True)
    elif api is not None:
        operators = admins = ShutDoor(_OFF)
    else:
        operators, admins = replace(anybody, origins=()), here if is_loopback(config.host) else ShutDoor(_OFF)
    clients: Door = anybody if api is None else KeyDoor(api)
    keeper: Door = here if admin is None else KeyDoor(admin, takes_password=True)
    return (
        Access(clients, operators, admins, config.open_paths),
        Access(ShutDoor("this is served at server.port"), keeper, keeper, config.open_paths),
    )


def _names(config: ServerConfig) -> frozenset[str] | None:
    """What `Host` may say; None where the server cannot know, as it is open to others than this machine."""
    if not is_loopback(config.host) and not config.allowed_hosts:
        return None
    return frozenset(name.lower() for name in (config.host, *config.allowed_hosts))


def check_origin(call: Call, allowed: tuple[str, ...]) -> None:
    """Raises `RequestError` (403) where a web page from elsewhere makes a browser call; programs send no `Origin`."""
    origin = call.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if _netloc(origin) != call.headers.get("host", "").lower():
        reason = f"a web page of {origin[:100]!r} may not call this server: add it to server.cors_origins if it may"
        raise RequestError(reason, status=403, code="forbidden_origin")


def _netloc(origin: str) -> str | None:
    """None where it is no URL."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def host_name(host: str) -> str:
    """Of a `Host` header, in lower case and without the port; the whole where it cannot be one."""
    found = _HOST.fullmatch(host)
    return host if found is None else found[1].lower()


@lru_cache(maxsize=64)
def is_loopback(name: str) -> bool:
    """Whether a host, by name or address, is this machine's alone. Nothing is resolved."""
    text = name.lower().removeprefix("[").removesuffix("]")
    if text == "localhost" or text.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def _admin_ring(config: ServerConfig, environ: Mapping[str, str]) -> KeyRing | None:
    key = environ.get(ADMIN_KEY_VARIABLE, "").strip()
    if key and len(key) < MIN_KEY_CHARACTERS:
        raise ConfigError(f"the key in {ADMIN_KEY_VARIABLE} is shorter than {MIN_KEY_CHARACTERS}: flowkv api-key")
    fixed = [ApiKey("admin", digest_of(key))] if key else []
    path = config.admin_key_file
    return KeyRing(fixed, None if path is None else Path(path).expanduser()) if fixed or path else None


def _check_exposure(config: ServerConfig, api: KeyRing | None, admin: KeyRing | None) -> None:
    if api is None and not is_loopback(config.host) and not config.insecure:
        raise ConfigError(
            f"whoever reaches {config.host} could use this server: make keys (flowkv api-key NAME --file FILE) and "
            f"give them in --api-key-file or {API_KEYS_VARIABLE}, or say --insecure if that is what you want"
        )
    if config.admin_port is not None and admin is None and not is_loopback(config.admin_host):
        raise ConfigError(
            f"whoever reaches {config.admin_host} could stop this server: an operators' port that is not on a loopback "
            f"address needs --admin-key-file or {ADMIN_KEY_VARIABLE}"
        )


def _is_under(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}/")


def _password(encoded: str) -> str:
    """Of Basic credentials, whoever the user is; nothing where they are broken."""
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
