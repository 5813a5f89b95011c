"""The command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowkv import __version__
from flowkv.config import DTYPES, ClusterConfig, load_config
from flowkv.errors import FlowKVError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. Every error of ours is one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except FlowKVError as error:
        print(f"flowkv: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the launcher has taken over
        return 130
    return 0


def _serve(args: argparse.Namespace) -> None:
    config = load_config(args.config, _overrides(args), args.set)
    from flowkv.display import TerminalDisplay  # what --help does not need
    from flowkv.launch import Launcher

    with TerminalDisplay(config) as display:
        Launcher(config, display).run()


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by configuration key."""
    keys = {
        "model": "model", "model_name": "model_name", "prefill": "prefill", "decode": "decode", "mixed": "mixed",
        "dtype": "dtype", "toy": "toy", "host": "server.host", "port": "server.port", "kv_memory": "engine.kv_memory",
        "threads": "engine.threads",
    }  # fmt: skip
    given = {key: getattr(args, option) for option, key in keys.items()}
    return {key: value for key, value in given.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowkv", description="Serve large language models with prefill and decode on different instances."
    )
    parser.add_argument("--version", action="version", version=f"flowkv {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands)
    return parser


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="start an OpenAI-compatible server over prefill and decode instances on this machine",
        description="Start an OpenAI-compatible server over prefill and decode instances on this machine. "
        "Ctrl-C or SIGTERM stops it and leaves nothing behind.",
        epilog="Options win over the configuration file, and --set over both.",
    )
    serve.set_defaults(command=_serve)
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
    server = serve.add_argument_group("server")
    server.add_argument("--host", help=f"address to listen on (default: {defaults.server.host})")
    server.add_argument(
        "--port", type=int, help=f"port to listen on, 0 for any free one (default: {defaults.server.port})"
    )
    server.add_argument(
        "--model-name", metavar="NAME", help="what the API calls the model (default: its folder's name)"
    )
    files = serve.add_argument_group("configuration")
    files.add_argument("--config", type=Path, metavar="FILE", help="TOML file; docs/operations.md lists its keys")
    files.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of it, such as engine.block_size=32"
    )


if __name__ == "__main__":
    sys.exit(main())
