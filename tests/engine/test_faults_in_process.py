"""Engines and controller under faults: every request is answered once, and every block is free when all are awake."""

import random

import pytest

from tests.cluster_in_process import Cluster, Faults
from tests.effort import seeds
from tests.engine.test_cluster_in_process import D, M, P, prompt, reference

NETWORK = Faults(lost=0.1, doubled=0.1, late=0.2)
LINKS = Faults(failed_write=0.15, lost_arrival=0.1)
ALL = Faults(lost=0.05, doubled=0.1, late=0.15, failed_write=0.05, lost_arrival=0.05)
ROLES = [[P, D], [P, P, D], [P, D, D], [P, P, D, D], [P, D, M]]
SEEDS = seeds(100)


class Run:
    """A seeded cluster with some requests under way."""

    def __init__(self, seed: int, faults: Faults, num_requests: int = 5) -> None:
        self.random = random.Random(f"run {seed}")
        roles = self.random.choice(ROLES)
        self.cluster = Cluster(roles, num_blocks=self.random.randint(20, 60), seed=seed, faults=faults)
        self.shapes = [
            (self.random.randint(1, 60), self.random.randint(1, 12), self.random.choice([1, 1, 1, 2, 3]))
            for _ in range(num_requests)
        ]
        self.aborted: set[str] = set()
        for i, (num_tokens, max_tokens, n) in enumerate(self.shapes):
            self.cluster.submit(f"r{i}", prompt(i, num_tokens), max_tokens=max_tokens, n=n, temperature=0.5, seed=i)

    def go_on(self, max_events: int) -> None:
        for _ in range(self.random.randint(0, max_events)):
            self.cluster.step()

    def wait(self, max_beats: int) -> None:
        for _ in range(self.random.randint(0, max_beats)):
            self.cluster.pass_time()
            self.go_on(60)

    @property
    def is_answered(self) -> bool:
        answers = self.cluster.answers
        return all(
            all(answers[f"r{i}", c].finish_reason is not None for c in range(n))
            for i, (_, _, n) in enumerate(self.shapes)
        )

    def victim(self) -> str:
        return self.random.choice(sorted(self.cluster.nodes))

    def abort_one(self) -> None:
        i = self.random.randrange(len(self.shapes))
        choice = self.random.choice([None, *range(self.shapes[i][2])])
        self.aborted.add(f"r{i}")
        self.cluster.abort(f"r{i}", choice)

    def check(self) -> None:
        """All come to rest, everyone has one right answer, no block is lost."""
        self.cluster.run()
        self.cluster.check_at_rest()
        assert not self.cluster.rejected
        for i in range(len(self.shapes)):
            if f"r{i}" not in self.aborted:
                self.check_answer(i)

    def check_answer(self, i: int) -> None:
        num_tokens, max_tokens, n = self.shapes[i]
        for choice in range(n):
            expected = reference(prompt(i, num_tokens), choice, max_tokens=max_tokens, n=n, temperature=0.5, seed=i)
            answer = self.cluster.answers[f"r{i}", choice]
            assert all(expected[index] == token_id for index, token_id in answer.tokens.items())
            assert answer.ids == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_lost_doubled_and_late_messages(seed: int) -> None:
    run = Run(seed, NETWORK)
    run.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_writes_that_fail_and_counts_that_are_lost(seed: int) -> None:
    run = Run(seed, LINKS)
    run.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_one_is_stopped_at_any_moment_and_woken_later(seed: int) -> None:
    run = Run(seed, ALL if seed % 2 else Faults())
    for _ in range(2):
        run.go_on(300)
        victim = run.victim()
        run.cluster.freeze(victim)
        run.go_on(200)
        run.wait(12)
        run.go_on(400)
        run.cluster.wake(victim)
    run.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_everyone_is_answered_while_one_stays_stopped(seed: int) -> None:
    run = Run(seed, ALL if seed % 2 else Faults())
    run.go_on(300)
    victim = run.victim()
    run.cluster.freeze(victim)
    for _ in range(20_000):
        if run.is_answered:
            break
        assert run.cluster.step()
    assert run.is_answered
    run.cluster.wake(victim)
    run.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_aborts_under_faults(seed: int) -> None:
    run = Run(seed, ALL)
    for _ in range(4):
        run.go_on(150)
        run.abort_one()
    run.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_at_once(seed: int) -> None:
    run = Run(seed, ALL)
    run.go_on(300)
    frozen = run.victim()
    run.cluster.freeze(frozen)
    run.go_on(200)
    run.abort_one()
    run.wait(12)
    run.go_on(200)
    if len(run.cluster.nodes) > 2:
        run.cluster.kill(run.victim())
    run.go_on(200)
    run.cluster.wake(frozen)
    run.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_controller_is_killed_at_any_moment_and_nothing_is_lost(seed: int) -> None:
    run = Run(seed, ALL if seed % 2 else Faults())
    for _ in range(2):
        run.go_on(250)
        run.cluster.restart_controller()
        run.go_on(100)
        run.wait(8)
    if seed % 3 == 0 and len(run.cluster.nodes) > 2:
        run.cluster.kill(run.victim())
        run.cluster.restart_controller()
    run.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stopped_writer_that_wakes_late_writes_into_no_one_elses_block(seed: int) -> None:
    cluster = Cluster([P, P, D], num_blocks=24, seed=seed, faults=Faults(beat=0.0))
    cluster.submit("stopped", prompt(0, 60), max_tokens=4)
    while not (writers := [node for node in cluster.nodes.values() if node.writes]):
        assert cluster.step()
    [writer] = writers
    writer.is_frozen = writer.holds_writes = True
    cluster.pass_time(5)
    others = {f"r{i}": prompt(i, 12) for i in range(1, 7)}
    for request_id, ids in others.items():
        cluster.submit(request_id, ids, max_tokens=12)
    decoder = cluster.nodes["decode-2"].engine
    while decoder.load.num_decoding == 0:
        assert cluster.step()
    assert decoder.load.quarantined_blocks == 15
    cluster.wake(writer.name)
    cluster.run()
    cluster.check_at_rest()
    assert cluster.ids("stopped") == reference(prompt(0, 60), max_tokens=4)
    for request_id, ids in others.items():
        assert cluster.ids(request_id) == reference(ids, max_tokens=12)
