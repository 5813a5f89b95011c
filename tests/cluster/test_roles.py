"""Who leans to which phase, seen from what every instance could do of either."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.cluster.roles import Rating, RolePolicy, Verdict, best_division, total_utilisation, utilisation
from flowkv.types import Regime, Role

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def rating(name: str, role: Role, prefill: float, decode: float, load: float = 0.0, may_flip: bool = True) -> Rating:
    return Rating(name, role, prefill, decode, load, may_flip)


def equal(roles: list[Role], prefill: float, decode: float) -> list[Rating]:
    """Instances of the same hardware."""
    return [rating(f"i{n}", role, prefill, decode) for n, role in enumerate(roles)]


def flipped(ratings: list[Rating], verdict: Verdict) -> list[Rating]:
    """As they are once each has proved its flip."""
    roles = dict(verdict.flips)
    return [replace(r, role=roles.get(r.name, r.role)) for r in ratings]


def roles_of(ratings: list[Rating]) -> list[Role]:
    return [r.role for r in ratings]


def looks(policy: RolePolicy, ratings: list[Rating], count: int) -> list[tuple[str, Role]]:
    return [flip for _ in range(count) for flip in policy.look(ratings).flips]


shares = st.integers(0, 400).map(lambda number: number / 100)
ratings_lists = st.lists(
    st.tuples(st.sampled_from([P, D, M]), shares, shares, st.integers(0, 1000)), min_size=2, max_size=9
).map(
    lambda rows: [rating(f"i{n}", role, prefill, decode, load) for n, (role, prefill, decode, load) in enumerate(rows)]
)  # fmt: skip


def has_both(roles: set[Role]) -> bool:
    return Role.MIXED in roles or len(roles) == 2


@settings(max_examples=150, deadline=None)
@given(ratings_lists)
def test_no_phase_is_ever_left_without_an_instance(ratings: list[Rating]) -> None:
    division = best_division(ratings)
    assert set(division) == {r.name for r in ratings}
    assert has_both(set(division.values()))
    policy = RolePolicy()
    for _ in range(4):
        after = flipped(ratings, policy.look(ratings))
        assert has_both(set(roles_of(after))) or not has_both(set(roles_of(ratings)))
        ratings = after


@settings(max_examples=150, deadline=None)
@given(ratings_lists)
def test_the_last_instance_of_a_role_may_become_mixed_but_never_the_other_role(ratings: list[Rating]) -> None:
    policy = RolePolicy()
    for _ in range(3):
        verdict = policy.look(ratings)
        after = {r.name: r.role for r in flipped(ratings, verdict)}
        for role in (P, D):
            of_role = [r.name for r in ratings if r.role is role]
            leavers = {name: new for name, new in verdict.flips if name in of_role}
            if of_role and len(leavers) == len(of_role) and role not in after.values():
                assert Role.MIXED in after.values()


@settings(max_examples=150, deadline=None)
@given(ratings_lists, st.data())
def test_more_capacity_never_makes_anything_shorter(ratings: list[Rating], data: st.DataObject) -> None:
    roles = {r.name: r.role for r in ratings}
    before = utilisation(ratings, roles)
    at = data.draw(st.integers(0, len(ratings) - 1))
    more = data.draw(shares)
    better = replace(ratings[at], prefill=ratings[at].prefill + more, decode=ratings[at].decode + more)
    after = utilisation([*ratings[:at], better, *ratings[at + 1 :]], roles)
    assert after <= before * (1 + 1e-4) + 1e-6
    assert total_utilisation(ratings) >= 0


def test_utilisation_is_that_of_the_phase_that_is_shorter() -> None:
    assert utilisation(equal([P, D, D], 0.5, 1.0), {"i0": P, "i1": D, "i2": D}) == pytest.approx(2.0)
    assert utilisation(equal([P, P, D], 0.5, 1.0), {"i0": P, "i1": P, "i2": D}) == pytest.approx(1.0)


def test_a_mixed_instance_gives_what_one_phase_leaves_over() -> None:
    ratings = equal([P, D, M], 0.5, 1.0)  # of three units of time, prompts need two and decodes one
    assert utilisation(ratings, {"i0": P, "i1": D, "i2": M}) == pytest.approx(1.0, rel=1e-3)
    assert utilisation(ratings, {"i0": M, "i1": M, "i2": M}) == pytest.approx(1.0, rel=1e-3)


def test_mixed_instances_with_little_to_do_are_left_alone() -> None:
    ratings = equal([M, M, M, M], 5.0, 5.0)
    assert utilisation(ratings, {r.name: M for r in ratings}) == pytest.approx(0.1, rel=1e-3)
    policy = RolePolicy()
    assert looks(policy, ratings, 10) == []


def test_division_follows_what_the_work_needs() -> None:
    prompts = best_division(equal([P, P, D, D, D, D, D, D], 0.2, 1.0))
    assert sum(role is P for role in prompts.values()) == 6  # 6 * 0.2 beside 2 * 1.0
    outputs = best_division(equal([P, P, P, P, P, P, D, D], 1.0, 0.2))
    assert sum(role is D for role in outputs.values()) == 6


def test_hardware_that_is_better_at_a_phase_gets_it() -> None:
    fast_memory = [rating(f"m{n}", P, 0.3, 0.6) for n in range(4)]
    fast_arithmetic = [rating(f"a{n}", D, 0.6, 0.3) for n in range(4)]
    division = best_division(fast_memory + fast_arithmetic)
    assert {division[r.name] for r in fast_memory} == {D}
    assert {division[r.name] for r in fast_arithmetic} == {P}
    policy, ratings = RolePolicy(), fast_memory + fast_arithmetic
    for _ in range(5):
        ratings = flipped(ratings, policy.look(ratings))
    assert {r.role for r in ratings if r.name.startswith("m")} == {D}


def test_of_equals_the_least_loaded_change() -> None:
    ratings = [rating(f"i{n}", D, 0.5, 0.6, load) for n, load in enumerate([9.0, 4.0, 1.0, 7.0])]
    ratings = [*ratings, rating("p", P, 0.5, 0.6)]
    flips = looks(RolePolicy(), ratings, 3)
    assert sorted(flips) == [("i1", P), ("i2", P)]
    ratings = [rating(f"i{n}", P, 0.6, 0.5, load) for n, load in enumerate([9.0, 4.0, 1.0, 7.0])]
    flips = looks(RolePolicy(), [*ratings, rating("d", D, 0.6, 0.5)], 3)
    assert sorted(flips) == [("i1", D), ("i2", D)]


def test_the_same_ratings_flip_once_and_not_at_the_first_look() -> None:
    policy, ratings = RolePolicy(), equal([P, D, D, D, D, D], 0.3, 1.5)
    assert policy.look(ratings).flips == []
    verdict = policy.look(ratings)
    assert verdict.flips and verdict.regime is Regime.IMBALANCED
    assert looks(policy, flipped(ratings, verdict), 20) == []


def test_noise_flips_nothing() -> None:
    drawn, policy = random.Random(5), RolePolicy()
    for _ in range(200):
        ratings = [
            rating(f"i{n}", role, 0.35 * drawn.uniform(0.95, 1.05), 0.35 * drawn.uniform(0.95, 1.05), drawn.random())
            for n, role in enumerate([P, P, P, P, D, D, D, D])
        ]
        assert policy.look(ratings).flips == []


def test_a_single_odd_look_flips_nothing() -> None:
    policy = RolePolicy()
    calm, odd = equal([P, P, D, D], 0.8, 0.8), equal([P, P, D, D], 0.2, 2.0)
    for _ in range(10):
        assert looks(policy, calm, 3) == []
        assert looks(policy, odd, 1) == []


def test_where_nothing_is_short_roles_stay() -> None:
    policy = RolePolicy()
    assert looks(policy, equal([P, D, D, D], 5.0, 9.0), 20) == []


def test_one_that_may_not_flip_does_not() -> None:
    ratings = equal([P, D, D, D, D, D], 0.3, 1.5)
    held = [replace(r, may_flip=r.name in ("i1", "i4")) for r in ratings]
    flips = looks(RolePolicy(), held, 5)
    assert flips and {name for name, _ in flips} <= {"i1", "i4"}
    assert looks(RolePolicy(), [replace(r, may_flip=False) for r in ratings], 5) == []


def test_two_instances_of_which_one_has_next_to_nothing_to_do_share_the_other_phase() -> None:
    ratings = equal([P, D], 0.8, 40.0)
    after = flipped(ratings, RolePolicy().look(ratings))
    policy = RolePolicy()
    for _ in range(4):
        after = flipped(after, policy.look(after))
    assert roles_of(after) == [P, M]


def test_overload_asks_for_more_instances_only_after_several_looks() -> None:
    policy, ratings = RolePolicy(), equal([P, P, D, D], 0.3, 0.3)
    verdicts = [policy.look(ratings) for _ in range(12)]
    assert {v.regime for v in verdicts} == {Regime.OVERLOADED}
    assert verdicts[0].scale == verdicts[1].scale == 0
    assert 1 <= sum(v.scale for v in verdicts) < 6


def test_a_moment_of_overload_asks_for_nothing() -> None:
    policy = RolePolicy()
    for _ in range(20):
        assert policy.look(equal([P, P, D, D], 0.3, 0.3)).scale == 0
        assert policy.look(equal([P, P, D, D], 0.8, 0.8)).scale == 0


def test_little_to_do_for_long_asks_for_fewer_instances() -> None:
    policy, idle = RolePolicy(), equal([P, P, D, D], 9.0, 9.0)
    verdicts = [policy.look(idle) for _ in range(200)]
    assert {v.regime for v in verdicts} == {Regime.UNDERLOADED}
    assert all(v.scale == 0 for v in verdicts[:5]) and {v.scale for v in verdicts} == {0, -1}


def test_a_load_that_fits_is_normal_and_no_instances_no_load() -> None:
    assert RolePolicy().look(equal([P, P, D, D], 0.8, 0.8)) == Verdict(Regime.NORMAL)
    assert RolePolicy().look([]) == Verdict(Regime.NORMAL)


def test_an_instance_that_is_alone_does_both() -> None:
    for role in (P, D):
        assert RolePolicy().look(equal([role], 0.5, 0.5)).flips == [("i0", M)]
    assert looks(RolePolicy(), equal([M], 0.5, 0.5), 10) == []
