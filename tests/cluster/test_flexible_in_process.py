"""Roles that change at any moment, instances that drain, requests that are taken back: over real engines and a real
controller that may place either phase anywhere. Every request is answered as one instance alone would, or not at all.
"""

import random

import pytest

from flowkv.config import SchedulingConfig
from flowkv.messages import Drain, SetRole
from flowkv.types import FinishReason, Role
from tests.cluster_in_process import CONTROLLER, Cluster, Faults
from tests.effort import seeds
from tests.engine.test_cluster_in_process import D, M, P, prompt, reference

QUIET = Faults(beat=0.01)  # time passes, and nothing comes to harm
NETWORK = Faults(lost=0.05, doubled=0.1, late=0.15, failed_write=0.05, lost_arrival=0.05)
ROLES = [[P, D], [M, M], [P, P, D], [P, D, D], [P, D, M], [P, P, D, D], [D, D]]
FLEXIBLE = SchedulingConfig(roles="flexible")


class Run:
    """A seeded cluster, its requests, and what is done to it."""

    def __init__(self, seed: int, faults: Faults, num_requests: int = 8) -> None:
        self.random = random.Random(f"flexible {seed}")
        roles = self.random.choice(ROLES)
        self.cluster = Cluster(
            roles, num_blocks=self.random.randint(20, 60), seed=seed, faults=faults, scheduling=FLEXIBLE
        )
        self.shapes = [
            (self.random.randint(1, 60), self.random.randint(1, 12), self.random.choice([1, 1, 1, 2, 3]))
            for _ in range(num_requests)
        ]
        self.aborted: set[str] = set()
        self.draining: list[str] = []

    def submit(self, i: int) -> None:
        num_tokens, max_tokens, n = self.shapes[i]
        self.cluster.submit(f"r{i}", prompt(i, num_tokens), max_tokens=max_tokens, n=n, temperature=0.5, seed=i)

    def go_on(self, max_events: int) -> None:
        for _ in range(self.random.randint(0, max_events)):
            self.cluster.step()

    def flip(self) -> None:
        name = self.random.choice(sorted(self.cluster.nodes))
        self.cluster._post(CONTROLLER, name, SetRole(self.random.choice([P, D, M])))

    def abort(self, i: int) -> None:
        choice = self.random.choice([None, *range(self.shapes[i][2])])
        self.aborted.add(f"r{i}")
        self.cluster.abort(f"r{i}", choice)

    def drain(self) -> None:
        """As the controller does where it retires an instance; one is always left."""
        left = sorted(set(self.cluster.nodes) - set(self.draining))
        if len(left) > 1:
            name = self.random.choice(left)
            view = self.cluster.controller._views[name]
            view.is_draining = True
            self.cluster.controller._fleet.refresh(view)
            self.cluster._post(CONTROLLER, name, Drain())
            self.draining.append(name)

    def check(self) -> None:
        self.cluster.run()
        self.cluster.check_at_rest()
        assert not self.cluster.rejected
        for i, (num_tokens, max_tokens, n) in enumerate(self.shapes):
            for choice in range(n):
                expected = reference(prompt(i, num_tokens), choice, max_tokens=max_tokens, n=n, temperature=0.5, seed=i)
                answer = self.cluster.answers[f"r{i}", choice]
                assert all(expected[index] == token_id for index, token_id in answer.tokens.items())
                if f"r{i}" not in self.aborted:
                    assert answer.ids == expected and answer.finish_reason is FinishReason.LENGTH
        self.cluster.faults = None
        for _ in range(3):
            self.cluster.pass_time()
            self.cluster.run()
        for name in self.draining:
            assert self.cluster.controller._views[name].is_drained, f"{name} holds something"


def disturbed(seed: int, faults: Faults, *, drains: bool, aborts: bool) -> Run:
    run = Run(seed, faults)
    for i in range(len(run.shapes)):
        run.submit(i)
        run.go_on(25)
        for _ in range(run.random.randint(0, 2)):
            run.flip()
            run.go_on(10)
        if aborts and run.random.random() < 0.3:
            run.abort(run.random.randint(0, i))
        if drains and run.random.random() < 0.2:
            run.drain()
    for _ in range(5):
        run.flip()
        run.go_on(20)
    return run


@pytest.mark.parametrize("seed", seeds(40))
def test_flips_at_any_moment_change_no_answer(seed: int) -> None:
    disturbed(seed, QUIET, drains=False, aborts=False).check()


@pytest.mark.parametrize("seed", seeds(40))
def test_flips_drains_and_aborts(seed: int) -> None:
    disturbed(seed, QUIET, drains=True, aborts=True).check()


@pytest.mark.parametrize("seed", seeds(40))
def test_the_same_over_a_network_that_loses_and_doubles(seed: int) -> None:
    disturbed(seed, NETWORK, drains=True, aborts=True).check()


def test_the_controller_hears_of_every_flip() -> None:
    cluster = Cluster([P, D, M], scheduling=FLEXIBLE)
    for role in (Role.DECODE, Role.MIXED, Role.PREFILL):
        for name in cluster.nodes:
            cluster._post(CONTROLLER, name, SetRole(role))
        cluster.submit(f"r {role}", prompt(1, 20), max_tokens=5)
        cluster.run()
        assert {status.role for status in cluster.controller.statuses()} == {role}
        assert cluster.ids(f"r {role}") == reference(prompt(1, 20), max_tokens=5)
    cluster.check_at_rest()


def test_what_has_not_begun_goes_elsewhere_when_its_instance_drains_and_runs_once() -> None:
    cluster = Cluster([M, M], scheduling=FLEXIBLE)
    for i in range(12):
        cluster.submit(f"r{i}", prompt(i, 50), max_tokens=5)
    for _ in range(40):
        cluster.step()
    view = cluster.controller._views["mixed-0"]
    view.is_draining = True
    cluster.controller._fleet.refresh(view)
    cluster._post(CONTROLLER, "mixed-0", Drain())
    cluster.run()
    assert all(cluster.ids(f"r{i}") == reference(prompt(i, 50), max_tokens=5) for i in range(12))
    computed = [node.engine.counters.prefill_tokens for node in cluster.nodes.values()]
    assert sum(computed) == 12 * 50 and computed[1] > computed[0]
    cluster.check_at_rest()
    assert view.is_drained
