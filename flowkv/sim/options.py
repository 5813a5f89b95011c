"""What a simulation is of, on the command line: a workload and a cluster, as options and as what they stand for."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowkv.config import ROLE_POLICIES
from flowkv.errors import WorkloadError

if TYPE_CHECKING:
    from flowkv.sim.workload import TraceRequest

_POISSON_S = 300.0
_SHIFT_S = 1800.0


# --- the workload ----------------------------------------------------------------------------------------------------


def add_workload(simulate: argparse.ArgumentParser) -> None:
    what = simulate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--trace", type=Path, metavar="FILE", help="of Mooncake (JSON lines) or Azure (CSV), gzipped or not"
    )
    what.add_argument("--poisson", type=_positive, metavar="RATE", help="requests a second, at random")
    what.add_argument(
        "--shift", type=_positive, nargs="?", const=1.0, metavar="SCALE",
        help="24/s of 8,000 tokens in and 100 out in turns with 40/s of 500 in and 1,000 out, every 300 s for 1,800 s; "
        "both rates times SCALE (default: 1)",
    )  # fmt: skip
    what.add_argument("--list", action="store_true", help="list the cost models and where their figures come from")
    load = simulate.add_argument_group("workload")
    load.add_argument("--num-requests", type=count, metavar="N", help="the first so many")
    load.add_argument("--duration", type=_positive, metavar="S", help="those that arrive so early (--poisson: 300)")
    load.add_argument("--repeat", action="store_true", help="a trace's lengths over and over, to --num-requests")
    load.add_argument("--speedup", type=_positive, default=1.0, metavar="X", help="arrivals so many times as fast")
    load.add_argument("--scale-length", type=_positive, default=1.0, metavar="X", help="all lengths times this")
    load.add_argument("--prompt-tokens", type=_positive, default=500.0, metavar="MEAN", help="of --poisson (500)")
    load.add_argument("--output-tokens", type=_positive, default=100.0, metavar="MEAN", help="of --poisson (100)")
    load.add_argument("--spread", type=_not_negative, default=0.0, metavar="SIGMA", help="log-normal, of both (0)")
    load.add_argument(
        "--burstiness", type=_positive, default=1.0, metavar="SHAPE", help="of gamma gaps: below 1 they come in bursts"
    )


def build_workload(args: argparse.Namespace) -> "tuple[Iterable[TraceRequest], int]":
    """The requests and how many they are. Raises WorkloadError for a trace that is broken or too short."""
    from flowkv.sim.workload import repeated, scaled

    if args.repeat:
        if args.trace is None or args.num_requests is None or args.duration is not None:
            raise WorkloadError("--repeat takes a --trace and --num-requests to say where it ends, and no --duration")
        whole = scaled(_requests(args), args.scale_length, args.speedup)
        return repeated(whole, args.num_requests), args.num_requests
    requests = scaled(_requests(args), args.scale_length, args.speedup)
    if args.num_requests is not None and args.num_requests > len(requests):
        source = args.trace or "the workload"
        raise WorkloadError(f"{source} has {len(requests)} requests, fewer than {args.num_requests}")
    return requests[: args.num_requests], min(len(requests), args.num_requests or len(requests))


def _requests(args: argparse.Namespace) -> "Sequence[TraceRequest]":
    """Before lengths and times are scaled; at least one."""
    from flowkv.sim.workload import read_trace

    before_s = None if args.duration is None else args.duration * args.speedup
    if args.trace is None:
        requests = _drawn(args, before_s)
    else:
        requests = [request for request in read_trace(args.trace) if before_s is None or request.arrival_s < before_s]
    if not requests:
        raise WorkloadError("no request arrives in so short a time at so low a rate")
    return requests


def _drawn(args: argparse.Namespace, before_s: float | None) -> "Sequence[TraceRequest]":
    from flowkv.sim.workload import LogNormal, bursts, shift_test

    if args.shift is not None:
        return shift_test(args.shift, args.seed, duration_s=before_s or _SHIFT_S)
    prompt, output = (LogNormal(mean, args.spread) for mean in (args.prompt_tokens, args.output_tokens))
    return bursts(args.poisson, args.burstiness, before_s or _POISSON_S, prompt, output, args.seed)


# --- the cluster -----------------------------------------------------------------------------------------------------


def add_cluster(simulate: argparse.ArgumentParser) -> None:
    cluster = simulate.add_argument_group("cluster")
    cluster.add_argument("--prefill", type=int, metavar="N", help="prefill instances")
    cluster.add_argument("--decode", type=int, metavar="N", help="decode instances")
    cluster.add_argument("--mixed", type=int, metavar="N", help="instances that do both; alone, they serve aggregated")
    cluster.add_argument("--roles", choices=ROLE_POLICIES, help="whether they follow the load (default: flexible)")
    cluster.add_argument("--slo-ttft", type=float, metavar="S", help="bound on the time to first token")
    cluster.add_argument("--slo-tpot", type=float, metavar="S", help="bound on the time per output token")
    cluster.add_argument(
        "--admission", action="store_true", default=None, help="refuse what cannot be answered within the SLO"
    )
    cluster.add_argument(
        "--cost", action="append", metavar="NAME|FILE",
        help="what instances run on, as in --list, or a file of flowkv profile; once for all, or once for each",
    )  # fmt: skip
    cluster.add_argument("--config", type=Path, metavar="FILE", help="TOML file, as for flowkv serve")
    cluster.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of it, such as simulate.noise_fraction=0",
    )


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by configuration key."""
    given = {
        "prefill": args.prefill,
        "decode": args.decode,
        "mixed": args.mixed,
        "scheduling.roles": args.roles,
        "slo.ttft_s": args.slo_ttft,
        "slo.tpot_s": args.slo_tpot,
        "slo.admission": args.admission,
        "simulate.cost": args.cost[0] if args.cost and len(args.cost) == 1 else args.cost,
    }
    return {key: value for key, value in given.items() if value is not None}


# --- numbers ---------------------------------------------------------------------------------------------------------


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _not_negative(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
