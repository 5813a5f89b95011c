import pytest

from flowkv.cost import StepCost


def test_it_learns_the_speed_of_prefill_and_of_decode_steps() -> None:
    cost = StepCost()
    for _ in range(200):
        cost.learn(prefill_tokens=0, decode_choices=4, seconds=0.005)
        cost.learn(prefill_tokens=100, decode_choices=4, seconds=0.025)
    assert cost.decode_step_s == pytest.approx(0.005, rel=1e-3)
    assert cost.prefill_s(1000) == pytest.approx(0.2, rel=1e-3)


def test_a_mixed_step_faster_than_a_decode_step_costs_the_prompt_nothing_less() -> None:
    cost = StepCost(prefill_s_per_token=1e-3, decode_step_s=1.0)
    cost.learn(prefill_tokens=10, decode_choices=1, seconds=0.5)
    assert 0 <= cost.prefill_s_per_token <= 1e-3
