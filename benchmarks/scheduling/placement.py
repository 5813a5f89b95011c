"""How long a placement takes: `Fleet.place` over instances that all hold work and have all shown what steps cost."""

import random
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from benchmarks.report import percentile
from flowkv import __version__
from flowkv.cluster.fleet import Fleet
from flowkv.config import SchedulingConfig, SloConfig
from flowkv.messages import LoadReport, PeerInfo, Register, StepSample
from flowkv.types import InstanceCounters, InstanceLoad, ModelInfo, PoolDescriptor, Request, Role, SamplingParams

NUM_BLOCKS = 26_000
BLOCK_SIZE = 16
_NOW_S = 1.0
_MODEL = ModelInfo(name="llama-3.1-8b", dtype="bfloat16", vocab_size=128256, max_model_tokens=131072)


def measure(num_instances: int, num_placements: int, seed: int = 0) -> dict[str, Any]:
    """Microseconds of a placement alone, and of all that the controller's fleet does for a request."""
    rng = random.Random(f"placement/{num_instances}/{seed}")
    fleet = filled(num_instances, rng)
    place_us, whole_us = [], []
    for request in islice(_requests(rng), num_placements):
        began_s = time.perf_counter()
        ask = fleet.ask(request)
        asked_s = time.perf_counter()
        placement = fleet.place(ask, request)
        placed_s = time.perf_counter()
        assert placement is not None, "a filled fleet can hold any of these requests"
        fleet.assign(request, ask, placement, _NOW_S)
        done_s = time.perf_counter()
        home = placement.decode[0] if placement.decode else placement.prefill
        fleet.forget(request.request_id, placement.prefill, home)
        place_us.append((placed_s - asked_s) * 1e6)
        whole_us.append((done_s - began_s) * 1e6)
    return {"num_instances": num_instances, "num_placements": num_placements} | {
        f"{name}_us": {"p50": percentile(us, 0.5), "p99": percentile(us, 0.99)}
        for name, us in (("place", place_us), ("whole", whole_us))
    }


def filled(num_instances: int, rng: random.Random) -> Fleet:
    """Half prefill, half decode, with queues and decodes drawn at random."""
    fleet = Fleet(SloConfig(ttft_s=2.0, tpot_s=0.025), SchedulingConfig())
    pool = PoolDescriptor(
        node="one", layout_fingerprint="one", num_blocks=NUM_BLOCKS, block_bytes=2**21, endpoints={"shm": b""}
    )
    for number in range(num_instances):
        role = Role.PREFILL if number % 2 else Role.DECODE
        name = f"{role}-{number}"
        view = fleet.add(Register(PeerInfo(name, name, pool), role, _MODEL, BLOCK_SIZE, 256, __version__, "one"))
        view.is_in_service = True
        fleet.apply(_report(name, role, rng), _NOW_S)
    return fleet


def _report(name: str, role: Role, rng: random.Random) -> LoadReport:
    num_decoding, used = rng.randrange(100), rng.randrange(NUM_BLOCKS // 2)
    load = InstanceLoad(
        num_decoding=num_decoding, waiting_tokens=rng.randrange(30_000), decode_context_tokens=2000 * num_decoding,
        free_blocks=NUM_BLOCKS - used, used_blocks=used,
    )  # fmt: skip
    steps = [
        StepSample(tokens, tokens * 2000, choices, 2000 * choices, 0.005 + 3e-5 * tokens + 5e-5 * choices)
        for tokens, choices in ((rng.randrange(2048), rng.randrange(64)) for _ in range(8))
    ]
    return LoadReport(name, 0, role, load, InstanceCounters(), steps, [])


def _requests(rng: random.Random) -> Iterator[Request]:
    for number in range(10**9):
        sampling = SamplingParams(max_tokens=rng.randrange(2, 1000))
        yield Request(request_id=str(number), prompt_ids=range(rng.randrange(1, 20_000)), sampling=sampling)
