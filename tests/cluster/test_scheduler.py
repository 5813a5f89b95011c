"""Filter and pick: who may get what, whatever the scores."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv.cluster.columns import Columns, Field
from flowkv.cluster.policy import POLICIES, Ask, Policy, Scores
from flowkv.cluster.scheduler import place
from flowkv.config import SloConfig
from tests.cluster.loads import GONE, IDLE, D, P, ask, columns, decodes, home, placed, queue

MIXED: dict[Field, float] = {}


def scored(prefill: list[float], decode: list[float], handoff: float = 0.0) -> Policy:
    """Scores that are given, a row each."""
    zero = np.zeros(len(prefill))
    scores = Scores(np.array(prefill), np.array(decode), zero + handoff, zero, zero)
    return lambda _ask, _loads: scores


def test_the_best_of_each_phase_or_both_on_one_whichever_is_less() -> None:
    loads = columns(a=P, b=D)
    split = place(ask(), loads, scored([1.0, 5.0], [5.0, 1.0], 1.0), is_flexible=True, is_short=False)
    assert split is not None and (split.prefill, split.decode) == ("a", ["b"])
    together = place(ask(), loads, scored([1.0, 5.0], [5.0, 1.0], 9.0), is_flexible=True, is_short=False)
    assert together is not None and together.decode == []


def test_what_has_begun_is_computed_where_both_phases_are_best_and_not_where_its_decode_would_be() -> None:
    loads, policy = columns(a=P, b=D, c=D), scored([9.0, 6.0, 2.0], [1.0, 1.0, 2.0])
    for is_flexible in (True, False):
        placement = place(ask(), loads, policy, is_flexible=is_flexible, is_short=False, is_begun=True)
        assert placement is not None and (placement.prefill, placement.decode) == ("c", [])
    only = place(
        ask(), columns(a=P, b=P), scored([9.0, 1.0], [1.0, 1.0]), is_flexible=False, is_short=False, is_begun=True
    )
    assert only is not None and (only.prefill, only.decode) == ("b", [])


def test_who_is_asked_to_decode_best_first_and_not_who_prefills() -> None:
    loads = columns(i0=P, **{f"i{n}": D for n in range(1, 9)})
    decode = [0.0, 7.0, 3.0, 5.0, 1.0, 9.0, 4.0, 8.0, 6.0]
    placement = place(
        ask(), loads, scored([0.0] + [50.0] * 8, [40.0, *decode[1:]]), is_flexible=True, is_short=False
    )  # fmt: skip
    assert placement is not None and placement.prefill == "i0"
    assert placement.decode == ["i4", "i2", "i6", "i3"]


def test_a_request_of_one_token_is_decoded_by_nobody() -> None:
    placement = placed(ask(1000, 1), columns(p=P, d=D), is_short=True)
    assert (placement.prefill, placement.decode) == ("p", [])


@pytest.mark.parametrize("policy", POLICIES)
def test_fixed_roles_hold_whatever_the_load(policy: str) -> None:
    loads = columns(p=P | queue(50.0), d=D, e=D | decodes(3))
    placement = placed(ask(), loads, policy, is_flexible=False)
    assert (placement.prefill, placement.decode) == ("p", ["d", "e"])


@pytest.mark.parametrize("policy", POLICIES)
def test_fixed_roles_leave_a_request_where_no_other_may_have_it(policy: str) -> None:
    def where(**rows: dict[Field, float]) -> tuple[str, list[str]]:
        placement = placed(ask(), columns(**rows), policy, is_flexible=False)
        return placement.prefill, placement.decode

    assert where(p=P, d=D | GONE) == ("p", [])
    assert where(p=P | GONE, d=D) == ("d", [])
    assert where(m=MIXED, n=MIXED | queue(3.0) | decodes(5)) == ("m", [])


def test_an_instance_that_is_gone_or_too_small_gets_nothing() -> None:
    others: list[dict[Field, float]] = [GONE, {Field.POOL_TOKENS: 1050}, {Field.MAX_CHOICES: 2}]
    for other in others:
        for busy in (MIXED, queue(100.0) | decodes(200)):
            placement = placed(ask(1000, 100, num_choices=3), columns(a=other, b=busy))
            assert (placement.prefill, home(placement)) == ("b", "b")
        assert place(
            ask(1000, 100, num_choices=3), columns(a=other), POLICIES["least_loaded"], is_flexible=True, is_short=False
        ) is None  # fmt: skip


def seconds(most: float) -> st.SearchStrategy[float]:
    return st.integers(0, 10**6).map(lambda number: number / 10**6 * most)


rows = st.fixed_dictionaries(
    {
        Field.IS_AVAILABLE: st.sampled_from([0.0, 1.0, 1.0]),
        Field.POOL_TOKENS: st.sampled_from([100.0, 2000.0, 100_000.0]),
        Field.MAX_CHOICES: st.sampled_from([1.0, 4.0, 256.0]),
        Field.ROOM_TOKENS: st.integers(-100_000, 100_000).map(float),
        Field.QUEUE_S: seconds(1e6),
        Field.DEFERRED_S: seconds(1e6),
        Field.TOKEN_S: seconds(1.0),
        Field.PAIR_S: seconds(1e-3),
        Field.DECODING: st.integers(0, 256).map(float),
        Field.STEP_S: seconds(100.0),
        Field.FULL_STEP_S: seconds(100.0).map(lambda more_s: 100.0 + more_s),  # never less than the one before
        Field.PREFILL_FRACTION: seconds(1.0),
        Field.HOMES: st.integers(0, 1000).map(float),
        Field.HOME_TOKENS: st.integers(0, 10**6).map(float),
        Field.BASE_S: seconds(10.0),
        Field.CHOICE_S: seconds(1.0),
        Field.SLOT_S: seconds(1e-3),
        Field.WRITE_S: seconds(1e-3),
    }
)
roles = st.sampled_from([MIXED, P, D])
slos = st.sampled_from([SloConfig(), SloConfig(ttft_s=1.0), SloConfig(ttft_s=0.01, tpot_s=1e-3), SloConfig(tpot_s=1.0)])
asks = st.builds(
    ask, st.integers(1, 3000), st.floats(1, 500), num_choices=st.integers(1, 5), priority=st.integers(-2, 2),
    is_deferred=st.booleans(), slo=slos,
)  # fmt: skip


def can_hold(loads: Columns, row: int, wanted: Ask) -> bool:
    return bool(
        loads.column(Field.IS_AVAILABLE)[row]
        and loads.column(Field.POOL_TOKENS)[row] >= wanted.max_total_tokens
        and loads.column(Field.MAX_CHOICES)[row] >= wanted.num_choices
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(roles, rows), min_size=1, max_size=12), asks, st.booleans(), st.booleans())
def test_whatever_the_loads_a_request_goes_where_it_can_be_held(
    instances: list[tuple[dict[Field, float], dict[Field, float]]], wanted: Ask, is_flexible: bool, is_short: bool
) -> None:
    loads = columns(**{f"i{n}": IDLE | row | role for n, (role, row) in enumerate(instances)})
    able = {name for row, name in enumerate(loads.names) if can_hold(loads, row, wanted)}
    for policy in POLICIES.values():
        placement = place(wanted, loads, policy, is_flexible=is_flexible, is_short=is_short)
        assert (placement is None) == (not able)
        if placement is None:
            continue
        assert {placement.prefill, *placement.decode} <= able
        assert len(set(placement.decode)) == len(placement.decode) and placement.prefill not in placement.decode
        assert not (is_short and placement.decode)
        assert math.isfinite(placement.ttft_s) and math.isfinite(placement.tpot_s)
