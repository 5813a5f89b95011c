"""`flowkv profile` on the command line. Imports nothing heavy: the help of all commands passes here."""

import argparse
from pathlib import Path

from flowkv.config import DTYPES


def add_profile(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    profile = commands.add_parser(
        "profile",
        help="measure this machine, for flowkv simulate",
        description="Measure what steps of a model take on this machine, and transfers and messages between "
        "instances, and write a file that flowkv simulate takes as --cost. Leave the machine alone meanwhile.",
    )
    profile.set_defaults(command=_profile)
    profile.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of a Hugging Face model (default: the bundled one)"
    )
    profile.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write (JSON)")
    profile.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and KV (default: the model's own)")
    profile.add_argument("--threads", type=int, default=0, metavar="N", help="of one instance (default: as in serve)")
    profile.add_argument(
        "--concurrency",
        type=int,
        default=1,
        metavar="N",
        help="instances that work at the same time, since they share memory and cores: as many as will serve "
        "(default: 1)",
    )
    profile.add_argument("--quick", action="store_true", help="a coarser grid, and fewer repeats")
    profile.add_argument("--seed", type=int, default=0, help="of the order of measurements (default: 0)")
    profile.add_argument("--toy", action="store_true", help=argparse.SUPPRESS)


def _profile(args: argparse.Namespace) -> None:
    from flowkv.profile.measure import ProfileOptions, profile

    options = ProfileOptions(
        out=args.out, model=args.model, dtype=args.dtype, threads=args.threads, concurrency=args.concurrency,
        is_quick=args.quick, seed=args.seed, is_toy=args.toy,
    )  # fmt: skip
    profile(options)
