"""What the way to an engine costs: FlowKV's frontend and controller, and other routers, before instant engines.

python -m benchmarks.frontend                      # FlowKV, sglang-router, vllm-router (installed into results/peers/)
python -m benchmarks.frontend --only flowkv --tokens 1 --seconds 3

Two loads: one client that asks again when it is answered (latency), and many (requests a second). Beside wall time it
says how much CPU each process uses a request: where cores are few, or shared, that is the figure to trust.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.gateways import routers
from benchmarks.gateways.client import Answers, Load
from benchmarks.gateways.ours import OurGateway, cpu_s
from benchmarks.gateways.upstream import MODEL
from benchmarks.report import ROOT, percentile, print_table, write_report
from flowkv.bundled import MODEL_FOLDER, MODEL_NAME
from flowkv.config import ClusterConfig, ServerConfig
from flowkv.errors import FlowKVError
from flowkv.server.text.tokenizer import ModelTokenizer

DIRECT, OURS = "no gateway", "flowkv"
NUM_PROMPTS = 64
_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man me"
).split()


@dataclass(frozen=True, slots=True)
class Case:
    """`prompt` is `text` or `ids`."""

    prompt: str
    num_tokens: int
    streamed: bool

    @property
    def label(self) -> str:
        return f"{self.prompt}, {self.num_tokens} out{', streamed' if self.streamed else ''}"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one load on one gateway. CPU is in microseconds a request, by process."""

    gateway: str
    case: str
    connections: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    first_p50_ms: float
    cpu_us: dict[str, float]


class Gateways:
    """What stands between client and engines, one at a time."""

    def __init__(self, names: Sequence[str], logs: Path) -> None:
        self.names = names
        self._logs = logs
        self._known = {router.name: router for router in routers.ROUTERS}
        self._pythons = {
            name: routers.install(self._known[name].package, print) for name in names if name in self._known
        }

    @contextmanager
    def open(self, name: str, num_tokens: int) -> "Iterator[tuple[str, Mapping[str, int]]]":
        """URL, and the processes whose CPU counts."""
        if name == OURS:
            config = ClusterConfig(prefill=1, decode=1, server=ServerConfig(port=0))
            gateway = OurGateway(config)
            with gateway as url:
                yield url, gateway.pids
            return
        with ExitStack() as stack:
            engines = stack.enter_context(routers.engines(1 if name == DIRECT else 2, num_tokens, self._logs))
            pids = {f"engine {number}": engine.pid for number, engine in enumerate(engines)}
            urls = [engine.url for engine in engines]
            if name == DIRECT:
                yield urls[0], pids
                return
            router = routers.routing(self._known[name], self._pythons[name], urls, self._logs)
            process = stack.enter_context(router)
            yield process.url, {"router": process.pid, **pids}


def bodies(case: Case, model: str, num_prompt_tokens: int) -> list[str]:
    """Prompts of so many tokens of the bundled model's tokenizer, each another."""
    tokenizer = ModelTokenizer(MODEL_FOLDER)
    rng = random.Random(1)
    found = []
    for _ in range(NUM_PROMPTS):
        ids = tokenizer.encode(" ".join(rng.choices(_WORDS, k=num_prompt_tokens)))[:num_prompt_tokens]
        prompt = ids if case.prompt == "ids" else tokenizer.decode(ids)
        body = {"model": model, "prompt": prompt, "max_tokens": case.num_tokens, "stream": case.streamed}
        found.append(json.dumps(body | {"temperature": 0, "ignore_eos": True}))
    return found


def ask(url: str, texts: list[str], connections: int, warmup_s: float, seconds: float) -> Answers:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    load = Load(parts.hostname, parts.port, "/v1/completions", texts, connections, warmup_s, seconds)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gateways.client"], input=msgspec.json.encode(load), capture_output=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BenchmarkError(f"the client failed: {done.stderr.decode()[-2000:]}")
    answers = msgspec.json.decode(done.stdout, type=Answers)
    if answers.failures or not answers.num_answers:
        raise BenchmarkError(f"not every request was answered: {answers.failures or 'none at all'}")
    return answers


def measure(name: str, url: str, pids: Mapping[str, int], case: Case, args: argparse.Namespace) -> Iterator[Figures]:
    texts = bodies(case, MODEL_NAME if name == OURS else MODEL, args.prompt_tokens)
    for connections in args.connections:
        before_s = {process: cpu_s(pid) for process, pid in pids.items()}
        answers = ask(url, texts, connections, args.warmup, args.seconds)
        used_s = {process: cpu_s(pid) - before_s[process] for process, pid in pids.items()}
        cpu_us = {process: 1e6 * seconds / answers.num_all for process, seconds in used_s.items()}
        yield Figures(
            gateway=name,
            case=case.label,
            connections=connections,
            requests_per_s=answers.num_answers / answers.seconds,
            p50_ms=1000 * percentile(answers.latencies_s, 0.5),
            p99_ms=1000 * percentile(answers.latencies_s, 0.99),
            first_p50_ms=1000 * percentile(answers.first_bytes_s, 0.5),
            cpu_us={**cpu_us, "client": 1e6 * answers.cpu_s / answers.num_answers},
        )


def run(args: argparse.Namespace) -> list[Figures]:
    """Each gateway in turn, again in every round."""
    gateways = Gateways(args.only, ROOT / "results" / "frontend")
    found: list[Figures] = []
    for number in range(args.rounds):
        for name in gateways.names:
            for case in args.cases:
                with gateways.open(name, case.num_tokens) as (url, pids):
                    try:
                        for figures in measure(name, url, pids, case, args):
                            found.append(figures)
                            print(f"round {number + 1}: {_line(figures)}", flush=True)
                    except BenchmarkError as error:  # not every router takes token ids
                        if name in (DIRECT, OURS):
                            raise
                        print(f"round {number + 1}: {name} ({case.label}): {error}", flush=True)
    return found


def _line(figures: Figures) -> str:
    cpu = ", ".join(f"{process} {value:.0f}" for process, value in figures.cpu_us.items())
    return (
        f"{figures.gateway} ({figures.case}), {figures.connections} connections: {figures.requests_per_s:.0f}/s, "
        f"p50 {figures.p50_ms:.2f} ms, p99 {figures.p99_ms:.2f} ms; CPU us a request: {cpu}"
    )


def summarize(found: Sequence[Figures]) -> list[dict[str, object]]:
    """Medians over rounds; `added_p50_ms` is beyond the engine alone, asked by the same client."""
    groups: dict[tuple[str, str, int], list[Figures]] = {}
    for figures in found:
        groups.setdefault((figures.case, figures.gateway, figures.connections), []).append(figures)
    rows: list[dict[str, object]] = []
    for (case, gateway, connections), some in groups.items():
        direct = groups.get((case, DIRECT, connections), [])
        row = {
            name: statistics.median(getattr(one, name) for one in some)
            for name in ("requests_per_s", "p50_ms", "p99_ms")
        }
        added = row["p50_ms"] - statistics.median(one.p50_ms for one in direct) if direct else None
        cpu_us = {name: round(statistics.median(one.cpu_us[name] for one in some), 1) for name in some[0].cpu_us}
        rows.append(
            {
                "case": case,
                "gateway": gateway,
                "connections": connections,
                **row,
                "added_p50_ms": added,
                "cpu_us": cpu_us,
            }
        )
    return rows


def show(rows: Sequence[Mapping[str, object]]) -> None:
    header = ("load", "gateway", "connections", "requests/s", "p50 ms", "added", "p99 ms", "CPU us a request")
    table = []
    for row in rows:
        cpu = row["cpu_us"]
        assert isinstance(cpu, dict)
        added = row["added_p50_ms"]
        table.append((
            str(row["case"]), str(row["gateway"]), str(row["connections"]), f"{row['requests_per_s']:,.0f}",
            f"{row['p50_ms']:.2f}", "" if added is None else f"{added:.2f}", f"{row['p99_ms']:.2f}",
            ", ".join(f"{name} {value:.0f}" for name, value in cpu.items()),
        ))  # fmt: skip
    print_table(Console(width=200), header, table)


def _cases(texts: Sequence[str]) -> list[Case]:
    """From `text:16:stream` and the like."""
    cases = []
    for text in texts:
        prompt, num_tokens, *rest = text.split(":")
        cases.append(Case(prompt, int(num_tokens), rest == ["stream"]))
    return cases


def main() -> None:
    names = (DIRECT, OURS, *(router.name for router in routers.ROUTERS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="GATEWAY", help="; ".join(names))
    parser.add_argument(
        "--case", nargs="+", default=["text:1", "text:16:stream", "ids:1"], metavar="PROMPT:TOKENS[:stream]"
    )
    parser.add_argument("--prompt-tokens", type=int, default=500, metavar="N")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 64], metavar="N")
    parser.add_argument("--warmup", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "frontend.json", metavar="FILE")
    args = parser.parse_args()
    args.cases = _cases(args.case)
    try:
        found = run(args)
    except (BenchmarkError, FlowKVError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    rows = summarize(found)
    show(rows)
    write_report(args.output, {"summary": rows, "rounds": [asdict(figures) for figures in found]})
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
