"""A request is accepted only if it can be brought to its end, whichever of two unequal instances is the smaller."""

import pytest

from flowkv.config import SchedulingConfig
from flowkv.messages import Accepted, Rejected, Submit
from flowkv.types import Request, Role, SamplingParams
from tests.cluster.rig import FIXED, Out, Rig, dispatches, of_type

SMALL, LARGE = 10, 100  # blocks of 16 tokens
FLEXIBLE = SchedulingConfig()


def rig(prefill: int, decode: int, scheduling: SchedulingConfig, *, choices: tuple[int, int] = (8, 8)) -> Rig:
    """A prefill and a decode instance with pools of so many blocks."""
    rig = Rig(Role.PREFILL, num_blocks=prefill, max_choices=choices[0], scheduling=scheduling)
    rig.num_blocks, rig.max_choices = decode, choices[1]
    rig.register("decode-1", Role.DECODE)
    return rig


def submit(rig: Rig, num_tokens: int, n: int = 1, max_tokens: int = 10) -> Out:
    sampling = SamplingParams(max_tokens=max_tokens, n=n)
    return rig.take(Submit("f", Request(request_id="r", prompt_ids=range(num_tokens), sampling=sampling)))


@pytest.mark.parametrize("scheduling", [FIXED, FLEXIBLE], ids=["fixed", "flexible"])
@pytest.mark.parametrize(("prefill", "decode", "able"), [(SMALL, LARGE, "decode-1"), (LARGE, SMALL, "prefill-0")])
def test_what_fits_one_of_the_two_stays_there_from_the_first_token_to_the_last(
    prefill: int, decode: int, able: str, scheduling: SchedulingConfig
) -> None:
    out = submit(rig(prefill, decode, scheduling), 500)
    [(address, dispatch)] = dispatches(out)
    assert (address, dispatch.decode_instances) == (able, [])
    assert of_type(out, Accepted)


@pytest.mark.parametrize("scheduling", [FIXED, FLEXIBLE], ids=["fixed", "flexible"])
@pytest.mark.parametrize(("prefill", "decode"), [(SMALL, LARGE), (LARGE, SMALL)])
def test_what_fits_neither_is_refused_with_the_limit(prefill: int, decode: int, scheduling: SchedulingConfig) -> None:
    cluster = rig(prefill, decode, scheduling)
    [refused] = of_type(submit(cluster, 16 * LARGE - 9), Rejected)
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert f"more than the {16 * LARGE} tokens" in refused.message
    [refused] = of_type(submit(cluster, 5, n=9), Rejected)
    assert (refused.status, refused.code, refused.param) == (400, "too_many_choices", "n")
    assert of_type(submit(cluster, 16 * LARGE - 10), Accepted)


def test_what_one_has_the_room_for_and_another_the_choices_is_refused() -> None:
    cluster = rig(LARGE, SMALL, FLEXIBLE, choices=(2, 8))
    [refused] = of_type(submit(cluster, 500, n=4), Rejected)
    assert refused.status == 400
    assert f"more than the {16 * SMALL} tokens" in refused.message
    assert of_type(submit(cluster, 500, n=2), Accepted)


def test_what_only_a_stalled_instance_could_hold_may_come_again() -> None:
    cluster = rig(SMALL, LARGE, FLEXIBLE)
    cluster.wait(60, "prefill-0")
    [refused] = of_type(submit(cluster, 500), Rejected)
    assert (refused.status, refused.code) == (503, "unavailable")
    assert "could hold this request are stalled" in refused.message
