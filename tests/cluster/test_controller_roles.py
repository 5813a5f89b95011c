"""The controller sets roles: on the load that it sees, and it believes a flip when it is proved."""

from itertools import pairwise

from flowkv.config import SchedulingConfig, SloConfig
from flowkv.messages import Drain, SetRole
from flowkv.types import Regime, Role
from tests.cluster.rig import LAUNCHER, Out, Rig, dispatches, of_type

DWELL_S = 5.0
FLEXIBLE = SchedulingConfig(dwell_s=DWELL_S)
PROMPTS, OUTPUTS = (1000, 2), (20, 600)  # tokens of (prompt, output)


class Cluster(Rig):
    """Instances that compute 1,000 prompt tokens a second or decode some 700, and answer at once."""

    def __init__(self, *roles: Role, scheduling: SchedulingConfig = FLEXIBLE, proves: bool = True) -> None:
        super().__init__(
            *roles, num_blocks=10_000, max_choices=64, scheduling=scheduling, slo=SloConfig(tpot_s=0.05),
            launcher_address=LAUNCHER,
        )  # fmt: skip
        self.proves = proves
        self.orders: list[tuple[float, str, Role]] = []
        self.num_submitted = 0
        for name in self.names:
            self.teach(name, token_s=1e-3, choice_s=1e-3)

    def run(self, seconds: int, shape: tuple[int, int]) -> list[tuple[str, Role]]:
        """The flips that are ordered while two requests of this shape come every second."""
        before = len(self.orders)
        for _ in range(2 * seconds):
            self.answer(*shape)
            for name in self.names:
                self.report(name)
            self.obey(self.tick(0.5))
        return [(name, role) for _, name, role in self.orders[before:]]

    def answer(self, prompt: int, output: int) -> None:
        self.num_submitted += 1
        request_id = f"r{self.num_submitted}"
        [(address, _)] = dispatches(self.submit(request_id, prompt, output))
        self.report(address, finished=[(request_id, output)])

    def obey(self, out: Out) -> None:
        for address, message in out:
            if isinstance(message, SetRole):
                self.orders.append((self.now_s, address, message.role))
                if self.proves:
                    self.report(address, role=message.role)


def test_instances_that_have_little_to_do_take_the_role_that_is_short() -> None:
    cluster = Cluster(Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE)
    flips = cluster.run(10, PROMPTS)
    assert all(name.startswith("decode") and role is not Role.DECODE for name, role in flips)
    assert list(cluster.roles.values()).count(Role.PREFILL) == 3
    cluster.run(30, OUTPUTS)
    assert list(cluster.roles.values()).count(Role.DECODE) >= 2


def test_roles_that_are_fixed_stay() -> None:
    fixed = SchedulingConfig(roles="fixed", dwell_s=DWELL_S)
    cluster = Cluster(Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE, scheduling=fixed)
    assert cluster.run(20, PROMPTS) == []
    assert cluster.controller.roster.regime in (Regime.IMBALANCED, Regime.OVERLOADED)


def test_a_load_that_stays_the_same_flips_once() -> None:
    cluster = Cluster(Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE)
    cluster.run(15, PROMPTS)
    assert cluster.run(60, PROMPTS) == []


def test_a_flip_counts_when_a_report_proves_it_and_not_before() -> None:
    cluster = Cluster(Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE, proves=False)
    flips = cluster.run(20, PROMPTS)
    names = [name for name, _ in flips]
    assert names and len(set(names)) == len(names)  # nobody is told again before it has answered
    assert cluster.controller.roster.flips == [] and cluster.status().num_flips == 0
    cluster.report(names[0], role=Role.PREFILL)
    [flip] = cluster.controller.roster.flips
    assert (flip.instance, flip.old, flip.new) == (names[0], Role.DECODE, Role.PREFILL)
    assert flip.time_s == cluster.now_s
    status = cluster.status()
    assert status.num_flips == 1
    assert {s.name: s.num_flips for s in status.instances if s.num_flips} == {names[0]: 1}
    cluster.report(names[0])
    assert len(cluster.controller.roster.flips) == 1


def test_an_instance_keeps_a_role_for_the_dwell() -> None:
    cluster = Cluster(Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE)
    for _ in range(12):
        cluster.run(4, PROMPTS)
        cluster.run(4, OUTPUTS)
    times: dict[str, list[float]] = {}
    for time_s, name, _ in cluster.orders:
        times.setdefault(name, []).append(time_s)
    gaps = [after - before for at in times.values() for before, after in pairwise(at)]
    assert gaps, "the load was to flip somebody twice"
    assert min(gaps) >= DWELL_S


def test_there_is_always_somebody_for_each_phase() -> None:
    cluster = Cluster(Role.PREFILL, Role.DECODE, Role.DECODE)
    for shape in (PROMPTS, OUTPUTS) * 4:
        cluster.run(10, shape)
        roles = set(cluster.roles.values())
        assert Role.MIXED in roles or len(roles) == 2


def test_before_anything_is_known_of_costs_nobody_is_flipped() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE, num_blocks=10_000, scheduling=FLEXIBLE)
    for i in range(40):
        rig.submit(f"r{i}", 900)
        assert of_type(rig.tick(0.05), SetRole) == []


def test_one_that_is_draining_is_not_flipped_and_gets_nothing() -> None:
    scheduling = SchedulingConfig(min_instances=3, dwell_s=DWELL_S)
    cluster = Cluster(Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE, scheduling=scheduling)
    draining: list[str] = []
    for _ in range(200):
        draining += [address for address, message in cluster.tick(0.5) if isinstance(message, Drain)]
        for name in cluster.names:
            cluster.report(name)
    assert len(draining) == 1
    flips = cluster.run(10, PROMPTS)
    assert flips and draining[0] not in dict(flips)
    addresses = [cluster.dispatch(f"later {i}", num_tokens=100) for i in range(20)]
    assert all(draining[0] not in (address, *dispatch.decode_instances) for address, dispatch in addresses)
