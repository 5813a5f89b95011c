"""Made-up simulated runs, for the tests of what is told of them."""

from flowkv.cluster.roles import Flip
from flowkv.sim.figures import Distribution, InstanceSample, Record, Sample, SimResult
from flowkv.types import InstanceCounters, Regime, Role


def handed_over(index: int = 0, arrival_s: float = 1.0) -> Record:
    """Prefilled on `prefill-0` until 1 s after its arrival, decoded on `decode-0` until 3 s after."""
    return Record(index, arrival_s, 1000, 5, "prefill-0", "decode-0", ttft_s=1.0, e2el_s=3.0)


def stayed(index: int, arrival_s: float) -> Record:
    return Record(index, arrival_s, 500, 3, "decode-0", "decode-0", ttft_s=0.5, e2el_s=1.5)


def result() -> SimResult:
    refused = Record(3, 4.0, 9999, 0, error="no room", is_refused=True)
    itl = Distribution()
    itl.add([0.5, 0.5, 0.25], weight=2)
    counters = InstanceCounters(num_steps=4, transfer_bytes=4000, transfer_calls=2, transfer_seconds=0.5)
    return SimResult(
        records=[handed_over(0, 1.0), handed_over(1, 1.5), stayed(2, 2.0), refused],
        itl=itl,
        duration_s=4.0,
        samples=[sample(time_s, Role.DECODE if time_s < 3 else Role.PREFILL) for time_s in range(5)],
        flips=[Flip(3.0, "decode-0", Role.DECODE, Role.PREFILL, Regime.IMBALANCED)],
        counters={"prefill-0": counters, "decode-0": InstanceCounters(num_steps=6)},
        num_events=40,
    )


def sample(time_s: float, role: Role) -> Sample:
    """`decode-0` has this role and is retired after 3 s."""
    instances = {"prefill-0": InstanceSample(Role.PREFILL, 900, 0, 0.25)}
    if time_s <= 3:
        instances["decode-0"] = InstanceSample(role, 0, 3, 0.5)
    return Sample(time_s, instances, Regime.IMBALANCED if time_s >= 3 else Regime.NORMAL)
