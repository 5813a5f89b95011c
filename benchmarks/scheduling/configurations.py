"""Which clusters are compared, in the same words everywhere."""

from collections.abc import Mapping
from typing import Any

Overrides = dict[str, Any]

FLEXIBLE, MIXED, STOCK = "flexible", "mixed", "mixed, whole chunks"
ADMISSION, MIXED_ADMISSION = "flexible, admission", "mixed, admission"
NUM_INSTANCES = 8
BLOCK_TOKENS = 64
BATCH_TOKENS = 2048  # the default of vLLM's max_num_batched_tokens


def split(num_prefill: int, num_instances: int = NUM_INSTANCES) -> str:
    return f"{num_prefill}P{num_instances - num_prefill}D"


def base(cost: str | list[str], ttft_s: float | None, tpot_s: float | None) -> Overrides:
    """`cost` as in `SimulateConfig`; an SLO of None is none."""
    bounds = {"slo.ttft_s": ttft_s, "slo.tpot_s": tpot_s}
    known = {key: value for key, value in bounds.items() if value is not None}
    engine = {"engine.max_batch_tokens": BATCH_TOKENS, "engine.block_size": BLOCK_TOKENS}
    return {"simulate.cost": cost, **engine, **known}


def fixed(overrides: Mapping[str, Any], num_prefill: int, num_instances: int = NUM_INSTANCES) -> Overrides:
    """Prompts go to these instances and decodes to the others."""
    return {**_divided(overrides, num_prefill, num_instances), "scheduling.roles": "fixed"}


def flexible(
    overrides: Mapping[str, Any], num_prefill: int = NUM_INSTANCES // 2, num_instances: int = NUM_INSTANCES
) -> Overrides:
    """From this start the controller goes on by itself."""
    return {**_divided(overrides, num_prefill, num_instances), "scheduling.roles": "flexible"}


def mixed(overrides: Mapping[str, Any], num_instances: int = NUM_INSTANCES) -> Overrides:
    """Every instance does both phases of its requests; chunks keep the bound on TPOT where there is one."""
    return {**overrides, "prefill": 0, "decode": 0, "mixed": num_instances, "scheduling.roles": "fixed"}


def stock(overrides: Mapping[str, Any], num_instances: int = NUM_INSTANCES) -> Overrides:
    """What an aggregated server does out of the box: chunks of `BATCH_TOKENS` whatever they do to the decodes.

    It knows no SLO. A mixed instance gives half of `engine.max_batch_tokens` to prompts beside decodes, hence twice.
    """
    unbounded = {key: value for key, value in overrides.items() if not key.startswith("slo.")}
    return mixed({**unbounded, "engine.max_batch_tokens": 2 * BATCH_TOKENS}, num_instances)


def _divided(overrides: Mapping[str, Any], num_prefill: int, num_instances: int) -> Overrides:
    return {**overrides, "prefill": num_prefill, "decode": num_instances - num_prefill}
