"""The command line."""

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowkv import __version__
from flowkv.config import DTYPES, LOG_FORMATS, LOG_LEVELS, ROLE_POLICIES, ClusterConfig, LoggingConfig, load_config
from flowkv.errors import FlowKVError
from flowkv.profile.command import add_profile
from flowkv.sim.command import add_simulate
from flowkv.sim.options import count
from flowkv.sim.plan_command import add_plan
from flowkv.types import Role


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. Every error of ours is one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        status: int | None = args.command(args)
    except FlowKVError as error:
        print(f"flowkv: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the launcher has taken over
        return 130
    return status or 0


def _serve(args: argparse.Namespace) -> None:
    config = load_config(args.config, _overrides(args), args.set)
    from flowkv.display import open_display  # what --help does not need
    from flowkv.launch.serve import serve

    with open_display(config.logging) as display:
        serve(config, display)


def _join(args: argparse.Namespace) -> None:
    from flowkv.display import open_display
    from flowkv.launch.join import JoinOptions, join

    options = JoinOptions(
        controller=args.controller,
        role=Role(args.role),
        count=args.count,
        model=args.model,
        address=args.address,
        cluster_key_file=args.cluster_key_file,
        timeout_s=args.timeout,
        overrides=_overrides(args),
    )
    given = {"level": args.log_level, "format": args.log_format}
    logging = LoggingConfig(**{name: value for name, value in given.items() if value is not None})
    with open_display(logging) as display:
        join(options, display)


def _top(args: argparse.Namespace) -> None:
    from flowkv.top import top

    top(args.url, args.interval, args.once)


def _doctor(args: argparse.Namespace) -> int:
    config = load_config(args.config, _overrides(args), args.set)
    from flowkv.doctor.examination import examine
    from flowkv.doctor.machine import look_at_machine
    from flowkv.doctor.report import show, show_json

    return (show_json if args.json else show)(examine(config, look_at_machine(), args.controller))


def _restart(args: argparse.Namespace) -> None:
    from flowkv.restart import restart

    restart(args.url, args.instance, lambda text: print(text, flush=True))


def _key(args: argparse.Namespace) -> None:
    from flowkv.auth import new_key

    print(new_key())


def _api_key(args: argparse.Namespace) -> None:
    from flowkv.server.access.keys import add_key, key_line, new_key

    if args.file is not None:
        print(add_key(args.file, args.name))
        return
    key = new_key()
    print(f"{key}\n{key_line(args.name, key)}")


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by configuration key."""
    keys = {
        "model": "model", "model_name": "model_name", "prefill": "prefill", "decode": "decode", "mixed": "mixed",
        "dtype": "dtype", "toy": "toy", "host": "server.host", "port": "server.port", "kv_memory": "engine.kv_memory",
        "threads": "engine.threads", "slo_ttft": "slo.ttft_s", "slo_tpot": "slo.tpot_s", "admission": "slo.admission",
        "roles": "scheduling.roles", "min_instances": "scheduling.min_instances",
        "max_instances": "scheduling.max_instances", "listen": "network.listen",
        "cluster_key_file": "network.cluster_key_file", "api_key_file": "server.api_key_file",
        "admin_key_file": "server.admin_key_file", "admin_port": "server.admin_port", "insecure": "server.insecure",
        "tls_cert_file": "server.tls_cert_file", "tls_key_file": "server.tls_key_file",
        "trust_remote_code": "trust_remote_code", "allow_pickled_weights": "allow_pickled_weights",
        "log_level": "logging.level", "log_format": "logging.format", "otlp_endpoint": "tracing.otlp_endpoint",
    }  # fmt: skip
    given = {key: getattr(args, option, None) for option, key in keys.items()}
    return {key: str(value) if isinstance(value, Path) else value for key, value in given.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowkv", description="Serve large language models with prefill and decode on different instances."
    )
    parser.add_argument("--version", action="version", version=f"flowkv {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_join(commands)
    _add_top(commands)
    _add_doctor(commands)
    _add_restart(commands)
    add_simulate(commands)
    add_plan(commands)
    add_profile(commands)
    _add_key(commands)
    _add_api_key(commands)
    return parser


def _add_join(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    join = commands.add_parser(
        "join",
        help="add instances on this node to the cluster of another",
        description="Start instances on this node for the cluster of another, where flowkv serve --listen runs (or "
        "soon will). What they serve and how is that cluster's. Ctrl-C or SIGTERM takes them out again.",
    )
    join.set_defaults(command=_join)
    join.add_argument("controller", metavar="CONTROLLER_ADDRESS", help="HOST[:PORT] that serve listens on for nodes")
    join.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of the model on this node (default: its path on the other)"
    )
    join.add_argument("--role", choices=list(Role), required=True, help="of the instances here")
    join.add_argument("--count", type=count, default=1, metavar="N", help="instances here (default: 1)")
    join.add_argument(
        "--address", metavar="HOST", help="of this node, for the others (default: that of the route to the controller)"
    )
    join.add_argument(
        "--timeout", type=_positive_seconds, default=10.0, metavar="SECONDS", help="for an answer (default: 10)"
    )
    _add_key_file(join)
    _add_logging(join, ClusterConfig().logging)
    engine = join.add_argument_group("instances")
    engine.add_argument("--kv-memory", metavar="SIZE", help="KV pool of one instance (default: as in the cluster)")
    engine.add_argument("--threads", type=int, metavar="N", help="threads of one instance (default: as in the cluster)")


def _add_logging(parser: argparse.ArgumentParser, defaults: LoggingConfig) -> None:
    logs = parser.add_argument_group("logs")
    logs.add_argument("--log-level", choices=LOG_LEVELS, help=f"of all processes (default: {defaults.level})")
    logs.add_argument(
        "--log-format", choices=LOG_FORMATS, help=f"lines for people or for programs (default: {defaults.format})"
    )


def _default_url() -> str:
    defaults = ClusterConfig().server
    return f"http://{defaults.host}:{defaults.port}"


def _add_restart(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    restart = commands.add_parser(
        "restart",
        help="restart the instances of a running cluster one after another, losing nothing",
        description="Restart instances of a running cluster one after another: each finishes what it has while the "
        "others take what comes, and the next one's turn is when its successor is in service. Ends when all are "
        "replaced. An operators' key is taken from the variable FLOWKV_ADMIN_KEY.",
    )
    restart.set_defaults(command=_restart)
    url = _default_url()
    restart.add_argument("url", nargs="?", metavar="URL", default=url, help=f"of its server (default: {url})")
    restart.add_argument(
        "--instance", action="append", default=[], metavar="NAME", help="this one alone; several times for several"
    )


def _add_top(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    url = _default_url()
    top = commands.add_parser(
        "top",
        help="show the instances of a running cluster and what they do",
        description="Show instances, roles, queues and rates of a running cluster, live. Ctrl-C ends it.",
    )
    top.set_defaults(command=_top)
    top.add_argument("url", nargs="?", metavar="URL", default=url, help=f"of its server (default: {url})")
    top.add_argument(
        "--interval", type=_positive_seconds, default=1.0, metavar="SECONDS", help="between two looks (default: 1)"
    )
    top.add_argument("--once", action="store_true", help="print one table, after one interval, and exit")


def _add_key(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    key = commands.add_parser(
        "key",
        help="print a new key for a cluster of several nodes",
        description="Print a new random key. Put it into a file that only you can read, on every node of a cluster.",
    )
    key.set_defaults(command=_key)


def _add_api_key(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    api_key = commands.add_parser(
        "api-key",
        help="make a key for a client of the server, or for its operators",
        description="Print a new random key, once: the server keeps only its hash. With --file the line "
        "NAME:sha256:HASH is added there, without it that line is printed too. A running server notices when its "
        "file changes.",
    )
    api_key.set_defaults(command=_api_key)
    api_key.add_argument("name", metavar="NAME", help="whose it is; limits, logs and metrics go by it")
    api_key.add_argument("--file", type=Path, metavar="FILE", help="the file that --api-key-file names")


def _add_key_file(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    parser.add_argument(
        "--cluster-key-file",
        type=Path,
        metavar="FILE",
        help="the key that all nodes share; see flowkv key (default: the variable FLOWKV_CLUSTER_KEY)",
    )


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return seconds


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="start an OpenAI-compatible server over prefill and decode instances",
        description="Start an OpenAI-compatible server over prefill and decode instances on this node, "
        "and on others that join. Ctrl-C or SIGTERM drains it, a second one stops it at once; nothing stays behind.",
        epilog="Options win over the configuration file, and --set over both.",
    )
    serve.set_defaults(command=_serve)
    _add_cluster(serve)


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="look at this machine and a configuration, and say what would go wrong",
        description="Look at this machine and at what flowkv serve would be started with, and say what would go wrong "
        "and what to do about it. Nothing is started or sent. The exit status is 1 if something fails.",
        epilog="All other options are those of flowkv serve.",
    )
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument("--controller", metavar="HOST[:PORT]", help="of a cluster that this node is to join")
    _add_cluster(doctor)


def _add_cluster(serve: argparse.ArgumentParser) -> None:
    """What a cluster is started with."""
    defaults = ClusterConfig()
    serve.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of a Hugging Face model (default: the bundled one)"
    )
    cluster = serve.add_argument_group("cluster")
    cluster.add_argument("--prefill", type=int, metavar="N", help=f"prefill instances (default: {defaults.prefill})")
    cluster.add_argument("--decode", type=int, metavar="N", help=f"decode instances (default: {defaults.decode})")
    cluster.add_argument("--mixed", type=int, metavar="N", help="instances that do both; alone, they serve aggregated")
    cluster.add_argument("--toy", action="store_true", default=None, help="instances that check the KV cache, no model")
    engine = serve.add_argument_group("instances")
    engine.add_argument("--dtype", choices=DTYPES, help="of weights and KV (default: auto, the model's own)")
    engine.add_argument("--kv-memory", metavar="SIZE", help="KV pool of one instance, such as 512MiB (default: auto)")
    engine.add_argument(
        "--threads", type=int, metavar="N", help="threads of one instance (default: its share of the cores but one)"
    )
    engine.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run Python code that comes with the model"
    )
    engine.add_argument(
        "--allow-pickled-weights", action="store_true", default=None, help="read *.bin where there is no *.safetensors"
    )
    server = serve.add_argument_group("server")
    server.add_argument("--host", help=f"address to listen on (default: {defaults.server.host})")
    server.add_argument(
        "--port", type=int, help=f"port to listen on, 0 for any free one (default: {defaults.server.port})"
    )
    server.add_argument(
        "--model-name", metavar="NAME", help="what the API calls the model (default: its folder's name)"
    )
    _add_access(serve)
    _add_scheduling(serve)
    _add_logging(serve, defaults.logging)
    serve.add_argument_group("traces").add_argument(
        "--otlp-endpoint", metavar="URL", help="of an OpenTelemetry collector that gets each request's spans"
    )
    network = serve.add_argument_group("several nodes")
    network.add_argument(
        "--listen", metavar="HOST[:PORT]", help="address of this node where others may join (default port: 8100)"
    )
    _add_key_file(network)
    files = serve.add_argument_group("configuration")
    files.add_argument("--config", type=Path, metavar="FILE", help="TOML file; docs/operations.md lists its keys")
    files.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of it, such as engine.block_size=32"
    )


def _add_access(serve: argparse.ArgumentParser) -> None:
    access = serve.add_argument_group("who may call (docs/security.md)")
    access.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys of clients, made by flowkv api-key (or FLOWKV_API_KEYS)"
    )
    access.add_argument(
        "--admin-key-file", type=Path, metavar="FILE", help="keys of operators, likewise (or FLOWKV_ADMIN_KEY)"
    )
    access.add_argument("--admin-port", type=int, metavar="PORT", help="a port of their own for operators, on loopback")
    access.add_argument("--tls-cert-file", type=Path, metavar="FILE", help="serve HTTPS with this certificate (PEM)")
    access.add_argument("--tls-key-file", type=Path, metavar="FILE", help="and its key")
    access.add_argument(
        "--insecure", action="store_true", default=None, help="serve without keys to whoever reaches --host"
    )


def _add_scheduling(serve: argparse.ArgumentParser) -> None:
    slo = serve.add_argument_group("promises")
    slo.add_argument("--slo-ttft", type=float, metavar="SECONDS", help="bound on the time to the first token")
    slo.add_argument("--slo-tpot", type=float, metavar="SECONDS", help="bound on the time of each token after it")
    slo.add_argument(
        "--admission", action="store_true", default=None, help="refuse what cannot be answered within --slo-ttft (429)"
    )
    roles = serve.add_argument_group("roles and instances under load")
    roles.add_argument(
        "--roles", choices=ROLE_POLICIES, help="whether they follow the load or stay as started (default: flexible)"
    )
    roles.add_argument(
        "--min-instances", type=int, metavar="N", help="retire idle ones down to so many (default: retire none)"
    )
    roles.add_argument("--max-instances", type=int, metavar="N", help="add some up to so many (default: add none)")


if __name__ == "__main__":
    sys.exit(main())
