"""What can be set, in one place: `flowkv serve` options, a TOML file, and dotted overrides all end up here."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from flowkv.errors import ConfigError
from flowkv.types import Role

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("auto", "shm", "nixl")
TOOL_PARSERS = (
    "auto", "hermes", "llama3_json", "mistral", "qwen3_coder", "glm45", "deepseek_v3", "kimi_k2", "granite",
    "phi4_mini_json", "nemotron", "jamba",
)  # fmt: skip
REASONING_PARSERS = ("auto", "none", "think", "deepseek_r1", "granite", "kimi", "mistral", "seed_oss")
ROLE_POLICIES = ("flexible", "fixed")
POLICIES = ("predicted_latency", "least_loaded")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
DEFAULT_LISTEN_PORT = 8100
MAX_LOCAL_INSTANCES = 4096  # far above what a node can run: a misprint must not take the memory
_STEP_FRACTION = 0.95
_DECODE_STEP_FRACTION = 0.85  # of that on decode instances: whoever is handed over has waited for a step already
_ROLE_SHARE = {Role.PREFILL: 1, Role.MIXED: 2, Role.DECODE: 4}  # parts of a step, one of them for prompts
DEVICES = ("cpu",)  # more as their kernels come


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One instance. All instances of a cluster share it; only their role differs."""

    block_size: int = 16  # tokens
    kv_memory: str | int = "auto"  # of one pool: "512MiB", "4GiB", a number of bytes, or "auto"
    max_batch_tokens: int = 512  # prompt tokens computed in one step, at most
    max_choices: int = 256  # decoded at once
    max_repeats: int = (
        1  # steps that only decode, computed at a stretch; more save overhead and make tokens come in bursts
    )
    max_segments: int = 0  # of a reservation: others' blocks are moved to make room for it; 0: none ever are
    fused: bool = True  # run models of families that are known in merged and packed form, rather than as they are
    threads: int = 0  # 0: the cores there are but one, shared out between the instances
    check_integrity: bool = False  # after every step, that each block has exactly the holders it should; for tests

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"engine.block_size is a power of two, not {self.block_size}")
        if self.max_batch_tokens < self.block_size:
            raise ValueError("engine.max_batch_tokens holds at least one block")
        if self.max_choices < 1:
            raise ValueError("engine.max_choices is at least 1")
        if self.max_repeats < 1:
            raise ValueError("engine.max_repeats is at least 1")
        if self.max_segments < 0:
            raise ValueError("engine.max_segments is a number of segments, or 0 to move nothing")
        if self.threads < 0:
            raise ValueError("engine.threads is a number of threads, or 0 for a share of the cores")
        parse_bytes(self.kv_memory)


def prefill_budget(max_batch_tokens: int, block_size: int, role: Role, num_decoding: float) -> int:
    """Prompt tokens of a step: running decodes shrink it, the more the further the role leans to decoding."""
    if num_decoding == 0:
        return max_batch_tokens
    return max(block_size, max_batch_tokens // _ROLE_SHARE[role])


def step_bound_s(max_itl_s: float, role: Role) -> float:
    """Seconds of a step with a chunk that keeps the ITL bound."""
    return max_itl_s * (_DECODE_STEP_FRACTION if role is Role.DECODE else 1.0)


class SloConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request is promised, in seconds; None promises nothing.

    With a bound on TPOT every step that decodes is kept as short as that: chunks of prompts shrink to what fits. With
    `admission` a request that cannot be answered within the SLO wherever it is placed is refused (429, Retry-After)
    rather than queued. Without it such a request waits until nobody else does (`late_last`), or in the order of
    arrival, which makes those behind it late too.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    admission: bool = False
    late_last: bool = True

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            if value is not None and not 1e-6 <= value <= 1e6:
                raise ValueError(f"slo.{name} is a positive number of seconds, not {value}")
        if self.admission and self.ttft_s is None:
            raise ValueError("slo.admission needs slo.ttft_s, the bound that it predicts")

    @property
    def max_step_s(self) -> float | None:
        """What a step that decodes may be predicted to take: a little less, since it takes that only on average."""
        return None if self.tpot_s is None else _STEP_FRACTION * self.tpot_s


def _check_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")


class SchedulingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the controller places requests and sets roles.

    `roles` "flexible": any instance may get either phase of a request if that is best, and roles follow the load.
    "fixed": prompts go to prefill instances and decodes to decode instances, and roles stay as they were started.
    """

    roles: str = "flexible"
    policy: str = "predicted_latency"  # of placement, or "least_loaded"
    kv_budget: float = (
        0.0  # requests are refused (429) that would bring the KV of all to so many times the pools; 0: none
    )
    interval_s: float = 0.5  # between two looks at the whole cluster
    dwell_s: float = 5.0  # an instance keeps a role at least so long
    min_instances: int = 0  # the controller retires instances down to so many; 0: it retires none
    max_instances: int = 0  # the controller starts instances up to so many; 0: it starts none

    def __post_init__(self) -> None:
        _check_one_of("scheduling.roles", self.roles, ROLE_POLICIES)
        _check_one_of("scheduling.policy", self.policy, POLICIES)
        if self.kv_budget < 0:
            raise ValueError("scheduling.kv_budget is a number of times the KV pools, or 0")
        if not 0.01 <= self.interval_s <= 3600 or not 0 <= self.dwell_s <= 3600:
            raise ValueError("scheduling.interval_s and scheduling.dwell_s are numbers of seconds up to 3600")
        if min(self.min_instances, self.max_instances) < 0:
            raise ValueError("scheduling.min_instances and scheduling.max_instances are numbers of instances, or 0")
        if self.max_instances and self.min_instances > self.max_instances:
            raise ValueError("scheduling.min_instances is at most scheduling.max_instances")


class SimulateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `flowkv simulate` and `flowkv plan` need beyond the cluster; `flowkv serve` does not look at it.

    `cost` names what each instance runs on: `MODEL/HARDWARE` as in `flowkv simulate --list`, or a file that
    `flowkv profile` has written; one for all, or one for each instance in the order prefill, decode, mixed.
    """

    cost: str | list[str] = "llama-3.1-8b/h100"
    noise_fraction: float = 0.02  # standard deviation of a step's seconds about the cost model's
    message_s: float = 0.0002  # from one process to another
    link_bytes_per_s: float = 50e9  # of each instance, each way
    call_s: float = 3.5e-5  # of one call that moves a run
    start_s: float = 30.0  # until an instance that is added serves

    def __post_init__(self) -> None:
        if min(self.noise_fraction, self.message_s, self.call_s, self.start_s) < 0 or self.link_bytes_per_s <= 0:
            raise ValueError("simulate: fractions and seconds are not negative, and a link moves something")


class TransferConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV moves between instances."""

    backend: str = "auto"  # "shm" where two instances share memory, "nixl" where they do not; or one of them for all
    lease_s: float = 5.0  # a peer that is silent so long loses its reservations; their blocks wait for its word

    def __post_init__(self) -> None:
        _check_one_of("transfer.backend", self.backend, BACKENDS)
        if not 0.1 <= self.lease_s <= 3600:
            raise ValueError(f"transfer.lease_s is a number of seconds from 0.1 to 3600, not {self.lease_s}")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """HTTP: where, for whom (docs/security.md), and how large a request may be."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None  # of clients; also from FLOWKV_API_KEYS
    admin_key_file: str | None = None  # of operators; also from FLOWKV_ADMIN_KEY
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # for /admin and operators' pages alone; None: they are on `port`
    insecure: bool = False  # serve without keys on an address that is not this machine's alone
    open_paths: tuple[str, ...] = ("/health", "/ready")  # that need no key
    allowed_hosts: tuple[str, ...] = ()  # names that clients without a key may call this server by, besides its own
    cors_origins: tuple[str, ...] = ()  # web pages that may call, as "https://chat.example.com"; "*": any
    tls_cert_file: str | None = None  # with the whole chain, PEM
    tls_key_file: str | None = None
    max_header_bytes: int = 32 * 2**10
    max_body_bytes: int = 8 * 2**20
    drain_timeout_s: float = 30.0  # what runs has so long to finish when the server is told to stop; 0: no time
    tool_parser: str = "auto"  # how the model writes tool calls: as its chat template shows, or one of TOOL_PARSERS
    reasoning_parser: str = "auto"  # how it marks its thoughts, likewise: REASONING_PARSERS; "none": not told apart

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("admin_port", self.admin_port)):
            if port is not None and not 0 <= port <= 65535:
                raise ValueError(f"server.{name} is 0 (any free one) to 65535, not {port}")
        if not 0 <= self.drain_timeout_s <= 86400:
            raise ValueError(f"server.drain_timeout_s is a number of seconds up to 86400, not {self.drain_timeout_s}")
        if self.max_body_bytes < 1:
            raise ValueError(f"server.max_body_bytes is at least 1, not {self.max_body_bytes}")
        _check_one_of("server.tool_parser", self.tool_parser, TOOL_PARSERS)
        _check_one_of("server.reasoning_parser", self.reasoning_parser, REASONING_PARSERS)
        if not 1024 <= self.max_header_bytes <= 2**20:
            raise ValueError(f"server.max_header_bytes is from 1024 to 1048576, not {self.max_header_bytes}")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("server.tls_cert_file and server.tls_key_file go together")


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What clients may ask for, together and by key. 0 is no limit, unless it says otherwise.

    Tokens are those of prompts and of what comes. A key's line in the key file may have limits of its own.
    """

    concurrent: int = 0  # HTTP requests under way
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    key_concurrent: int = 0  # the same three, of each key
    key_requests_per_minute: int = 0
    key_tokens_per_minute: int = 0
    prompt_tokens: int = 0  # of one prompt
    choices: int = 0  # of one request (`n`)
    queue_timeout_s: float = 0.0  # a request without its first token by then is given up (503)
    head_timeout_s: float = 10.0  # from the first byte of a request to the end of its headers
    body_timeout_s: float = 60.0  # from there to the end of its body
    slow_reader_s: float = 30.0  # a client that takes nothing for so long is cut off
    slow_reader_bytes: int = 64 * 2**20  # or leaves so much unread

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"limits.{name} is not negative")
        for name in ("head_timeout_s", "body_timeout_s", "slow_reader_s"):
            if not 0.1 <= getattr(self, name) <= 86400:
                raise ValueError(f"limits.{name} is a number of seconds from 0.1 to 86400")
        if self.slow_reader_bytes < 2**16:
            raise ValueError("limits.slow_reader_bytes is at least 65536")


class LoggingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each process of the cluster says on stderr; at "info" also a line for each request that ends."""

    level: str = "warning"
    format: str = "text"  # or "json", an object a line

    def __post_init__(self) -> None:
        _check_one_of("logging.level", self.level, LOG_LEVELS)
        _check_one_of("logging.format", self.format, LOG_FORMATS)


class TracingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of requests that have ended, for `/requests` and `/trace`, and where their spans are sent."""

    keep_requests: int = 256
    otlp_endpoint: str | None = None  # base URL of an OpenTelemetry collector (HTTP); None: no spans are made

    def __post_init__(self) -> None:
        if not 1 <= self.keep_requests <= 1_000_000:
            raise ValueError(f"tracing.keep_requests is a number of requests, not {self.keep_requests}")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"tracing.otlp_endpoint is a URL such as http://host:4318, not {self.otlp_endpoint!r}")


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several nodes. All of them must have the same key: from this file, or else from the environment."""

    listen: str | None = None  # HOST[:PORT] where other nodes reach the controller; None: this node alone
    cluster_key_file: str | None = None
    node_timeout_s: float = 10.0  # controller and joined node give each other up after so long a silence

    def __post_init__(self) -> None:
        if self.listen is not None:
            parse_endpoint(self.listen)
        if not 2 <= self.node_timeout_s <= 3600:
            raise ValueError(f"network.node_timeout_s is a number of seconds from 2 to 3600, not {self.node_timeout_s}")


class RestartConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What becomes of a process that ends by itself: `launch.backoff` has the rule."""

    max_failures: int = 8  # in a row without progress, before it stays down; 0: none is started again
    max_delay_s: float = 30.0  # before the next one is started
    hung: bool = True  # an instance that stays stalled is killed; a controller or frontend that says nothing is too

    def __post_init__(self) -> None:
        if self.max_failures < 0:
            raise ValueError("restart.max_failures is a number of failures, or 0 to start nothing again")
        if not 0 <= self.max_delay_s <= 3600:
            raise ValueError(f"restart.max_delay_s is a number of seconds up to 3600, not {self.max_delay_s}")


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster: what all of its instances share, and the instances on the node of its controller.

    `model` None is the bundled one; `toy` needs none.
    """

    model: str | None = None
    model_name: str | None = None  # what /v1/models calls it; default: the folder's name
    dtype: str = "auto"
    trust_remote_code: bool = False  # run the Python that the model's folder brings along
    allow_pickled_weights: bool = False  # read *.bin where the folder has no *.safetensors
    device: str = "cpu"
    toy: bool = False
    toy_step_s: float = 0.0  # how long a step of a toy instance takes
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)
    server: ServerConfig = msgspec.field(default_factory=ServerConfig)
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)
    transfer: TransferConfig = msgspec.field(default_factory=TransferConfig)
    network: NetworkConfig = msgspec.field(default_factory=NetworkConfig)
    restart: RestartConfig = msgspec.field(default_factory=RestartConfig)
    logging: LoggingConfig = msgspec.field(default_factory=LoggingConfig)
    tracing: TracingConfig = msgspec.field(default_factory=TracingConfig)
    slo: SloConfig = msgspec.field(default_factory=SloConfig)
    scheduling: SchedulingConfig = msgspec.field(default_factory=SchedulingConfig)
    simulate: SimulateConfig = msgspec.field(default_factory=SimulateConfig)

    def __post_init__(self) -> None:
        _check_one_of("dtype", self.dtype, DTYPES)
        _check_one_of("device", self.device, DEVICES)
        if not 0 <= self.toy_step_s < 60:
            raise ValueError(f"toy_step_s is a number of seconds under 60, not {self.toy_step_s}")
        counts = (self.prefill, self.decode, self.mixed)
        if min(counts) < 0 or not (any(counts) or self.network.listen):
            raise ValueError("a cluster needs at least one instance: set prefill, decode or mixed")
        if sum(counts) > MAX_LOCAL_INSTANCES:
            raise ValueError(f"a node has at most {MAX_LOCAL_INSTANCES} instances, not {sum(counts)}")

    @property
    def roles(self) -> list[Role]:
        """The role of every instance of this node, in the order in which they are started."""
        return [Role.PREFILL] * self.prefill + [Role.DECODE] * self.decode + [Role.MIXED] * self.mixed


def load_config(path: Path | None, overrides: dict[str, Any], dotted: Sequence[str] = ()) -> ClusterConfig:
    """Defaults, then a TOML file, then `overrides` (top-level or `section.key`), then `section.key=value` strings.

    ConfigError names the key that is unknown or the value that cannot be.
    """
    tree: dict[str, Any] = {} if path is None else _read_toml(path)
    for key, value in overrides.items():
        _set(tree, key, value)
    for assignment in dotted:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set takes KEY=VALUE, for instance engine.block_size=32, not {assignment!r}")
        _set(tree, key.strip(), _parse_value(text.strip()))
    if tree.get("mixed") and "prefill" not in tree and "decode" not in tree:
        tree |= {"prefill": 0, "decode": 0}
    return _convert(tree)


def with_overrides(config: ClusterConfig, overrides: dict[str, Any]) -> ClusterConfig:
    """The same with other values for some `section.key`s. ConfigError as for `load_config`."""
    tree: dict[str, Any] = msgspec.to_builtins(config)
    for key, value in overrides.items():
        _set(tree, key, value)
    return _convert(tree)


def parse_endpoint(text: str) -> tuple[str, int]:
    """(host, port) of `HOST`, `HOST:PORT` or `[IPV6]:PORT`. ValueError for anything else."""
    host, separator, port = text.rpartition(":")
    if not separator or text.endswith("]") or (text.count(":") > 1 and not host.endswith("]")):
        host, port = text, str(DEFAULT_LISTEN_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"an address is HOST or HOST:PORT, with a port from 1 to 65535, not {text!r}")
    return host, int(port)


def _convert(tree: dict[str, Any]) -> ClusterConfig:
    try:
        return msgspec.convert(tree, ClusterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration: {error}") from None


def parse_bytes(text: str | int) -> int | None:
    """ "512MiB", "4GiB", "1e9" or 1000000 in bytes; None for "auto". ValueError for anything else."""
    if text == "auto":
        return None
    number, factor = str(text).strip(), 1
    for suffix, power in (("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)):
        if number.endswith(suffix):
            number, factor = number.removesuffix(suffix), 2**power
    try:
        num_bytes = int(float(number) * factor)
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0:
        raise ValueError(f'engine.kv_memory is a size such as "512MiB" or "4GiB", or "auto", not {text!r}')
    return num_bytes


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse_value(text: str) -> Any:
    """As TOML reads it; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"configuration: {section!r} is a value, not a section, in {key!r}")
    tree[last] = value
