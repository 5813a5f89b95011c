"""Where a request goes, seen from what is known of every instance."""

import pytest

from flowkv.cluster.columns import Field
from flowkv.cluster.policy import POLICIES
from flowkv.config import SloConfig
from tests.cluster.loads import D, P, ask, columns, decodes, home, placed, queue

SLO = SloConfig(ttft_s=1.0, tpot_s=0.1)
FULL_P = P | {Field.ROOM_TOKENS: -90_000}  # who prefills here decodes elsewhere


def test_on_instances_with_nothing_to_do_each_phase_goes_to_whose_role_it_is() -> None:
    loads = columns(a=D | decodes(1), b=P | decodes(0), c=D | decodes(1))
    placement = placed(ask(4000, 400, slo=SLO), loads)
    assert placement.prefill == "b" and home(placement) in ("a", "c")


def test_a_prompt_stays_with_prefill_instances_while_their_queue_keeps_the_slo() -> None:
    for wait_s, expected in ((0.2, "p"), (5.0, "d")):
        loads = columns(p=P | queue(wait_s), d=D | decodes(4))
        assert placed(ask(1000, slo=SLO), loads).prefill == expected


def test_of_plans_that_keep_the_slo_the_cheapest_wins_though_another_is_cheaper_still() -> None:
    """A prompt where many decode stretches the steps of all: that costs more than 2 s of waiting, but keeps the SLO."""
    crowded = decodes(60)
    for wait_s, slo, expected in ((0.1, SLO, "waits"), (2.0, SLO, "crowded"), (2.0, None, "waits")):
        loads = columns(waits=queue(wait_s), crowded=crowded)
        assert placed(ask(1000, 1, slo=slo), loads, is_short=True).prefill == expected
    alone, shared = D | {Field.BASE_S: 0.12}, D | {Field.BASE_S: 0.0, Field.CHOICE_S: 8e-4, Field.HOMES: 100}
    for slo, expected in ((SLO, "shared"), (None, "alone")):
        assert home(placed(ask(slo=slo), columns(p=FULL_P, alone=alone, shared=shared))) == expected


def test_where_none_keeps_the_slo_the_least_late_wins() -> None:
    loads = columns(a=P | queue(9.0), b=P | queue(4.0), c=D | queue(6.0))
    assert placed(ask(slo=SLO), loads).prefill == "b"
    slow, slower = decodes(1) | {Field.BASE_S: 0.2}, decodes(1) | {Field.BASE_S: 0.4}
    assert home(placed(ask(slo=SLO), columns(a=slower, b=slow, c=slower))) == "b"


def test_without_an_slo_the_earliest_first_token_wins_and_the_shortest_steps() -> None:
    loads = columns(a=P | queue(0.5), b=P | queue(0.1), c=D | decodes(40), d=D | decodes(4))
    placement = placed(ask(), loads)
    assert (placement.prefill, home(placement)) == ("b", "d")


def test_prompts_go_where_they_delay_fewer_who_decode() -> None:
    loads = columns(a=decodes(40), b=decodes(5), c=decodes(40))
    assert placed(ask(4000, 10), loads).prefill == "b"


@pytest.mark.parametrize("policy", POLICIES)
def test_decodes_go_to_another_than_the_fullest(policy: str) -> None:
    loads = columns(p=FULL_P, a=D | decodes(20), b=D | decodes(60), c=D | decodes(30))
    placement = placed(ask(), loads, policy)
    assert placement.decode[0] == "a"
    assert "b" not in placement.decode[:2]


@pytest.mark.parametrize("policy", POLICIES)
def test_one_without_room_for_the_kv_is_avoided(policy: str) -> None:
    full = D | {Field.ROOM_TOKENS: 500}
    assert home(placed(ask(1000, 100), columns(p=FULL_P, a=full, b=D | decodes(50)), policy)) == "b"
    assert home(placed(ask(300, 100), columns(p=FULL_P, a=full, b=D | decodes(50)), policy)) == "a"


def test_where_nobody_has_room_the_fullest_is_avoided() -> None:
    nearly, quite = D | {Field.ROOM_TOKENS: 900}, D | {Field.ROOM_TOKENS: -50_000}
    assert home(placed(ask(1000, 100), columns(p=FULL_P, a=quite, b=nearly))) == "b"


def test_all_choices_of_a_request_need_room() -> None:
    tight = D | {Field.ROOM_TOKENS: 2000}
    loads = columns(p=FULL_P, a=tight, b=D | decodes(20))
    assert home(placed(ask(1000, 500), loads)) == "a"
    assert home(placed(ask(1000, 500, num_choices=4), loads)) == "b"


def test_a_faster_instance_gets_it_though_more_wait_there() -> None:
    slow, fast = {Field.TOKEN_S: 1e-3}, {Field.TOKEN_S: 1e-4}
    assert placed(ask(2000), columns(a=slow | queue(0.1), b=fast | queue(0.5))).prefill == "b"
    assert placed(ask(2000), columns(a=slow | queue(0.1), b=fast | queue(5.0))).prefill == "a"


def test_long_contexts_count() -> None:
    """What is fast for a token may be slow for attention."""
    loads = columns(a={Field.TOKEN_S: 1e-4, Field.PAIR_S: 1e-7}, b={Field.TOKEN_S: 2e-4})
    assert placed(ask(100, 1), loads, is_short=True).prefill == "a"
    assert placed(ask(20_000, 1), loads, is_short=True).prefill == "b"


def test_what_is_urgent_does_not_queue_and_what_is_deferred_queues_behind_all() -> None:
    deferred = {Field.DEFERRED_S: 5.0}
    loads = columns(a=deferred, b=queue(1.0))
    assert placed(ask(), loads).prefill == "a"
    assert placed(ask(is_deferred=True), loads).prefill == "b"
    faster = queue(5.0) | {Field.TOKEN_S: 5e-5}
    urgent = placed(ask(priority=-1), columns(a=faster, b={Field.TOKEN_S: 1e-4}), is_short=True)
    assert urgent.prefill == "a" and urgent.ttft_s < 1.0


def test_predictions_tell_what_queues_and_steps_make_of_it() -> None:
    placement = placed(ask(1000, 100), columns(p=P | queue(0.5), d=D | decodes(10)), is_flexible=False)
    assert placement.ttft_s == pytest.approx(0.5 + 1000 * 1e-4)
    assert placement.tpot_s == pytest.approx(0.01 + 11 * 1e-4 + (1000 + 1050) * 1e-8, rel=0.01)


def test_least_loaded_counts_and_predicts_nothing() -> None:
    loads = columns(
        a=P | queue(1.0) | {Field.TOKEN_S: 1e-3}, b=P | queue(0.5) | {Field.TOKEN_S: 1e-4},
        c=D | decodes(3) | {Field.BASE_S: 9.0}, d=D | decodes(4),
    )  # fmt: skip
    placement = placed(ask(), loads, "least_loaded")
    assert (placement.prefill, placement.decode[:2]) == ("a", ["c", "d"])  # 1,000 tokens wait there, 5,000 at b
