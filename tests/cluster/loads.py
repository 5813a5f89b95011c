"""Columns written by hand, and what is asked of them."""

from flowkv.cluster.columns import Columns, Field
from flowkv.cluster.policy import POLICIES, Ask
from flowkv.cluster.scheduler import Placement, place
from flowkv.config import SloConfig

# An instance with nothing to do: 10 ms a step that decodes, 10,000 prompt tokens a second.
IDLE: dict[Field, float] = {
    Field.IS_AVAILABLE: 1,
    Field.POOL_TOKENS: 100_000,
    Field.MAX_CHOICES: 256,
    Field.ROOM_TOKENS: 95_000,
    Field.TOKEN_S: 1e-4,
    Field.FULL_STEP_S: 0.05,
    Field.BASE_S: 0.01,
    Field.CHOICE_S: 1e-4,
    Field.SLOT_S: 1e-8,
    Field.WRITE_S: 1e-7,
}
P: dict[Field, float] = {Field.IS_PREFILL: 1}
D: dict[Field, float] = {Field.IS_DECODE: 1}
GONE: dict[Field, float] = {Field.IS_AVAILABLE: 0}


def queue(seconds: float) -> dict[Field, float]:
    return {Field.QUEUE_S: seconds}


def decodes(num_choices: int, tokens_each: int = 100) -> dict[Field, float]:
    """Choices that decode there now, and will."""
    step_s = IDLE[Field.BASE_S] + num_choices * (IDLE[Field.CHOICE_S] + tokens_each * IDLE[Field.SLOT_S])
    return {
        Field.DECODING: num_choices, Field.HOMES: num_choices, Field.HOME_TOKENS: num_choices * tokens_each,
        Field.ROOM_TOKENS: IDLE[Field.ROOM_TOKENS] - num_choices * tokens_each, Field.STEP_S: step_s,
        Field.FULL_STEP_S: step_s + 0.04,
    }  # fmt: skip


def columns(**rows: dict[Field, float]) -> Columns:
    """A row for each name, where it differs from one with nothing to do."""
    table = Columns()
    for name, row in rows.items():
        table.add(name)
        table.write(name, tuple((IDLE | row).get(field, 0.0) for field in Field))
    return table


def ask(
    prompt: int = 1000,
    output: float = 100.0,
    *,
    num_choices: int = 1,
    priority: int = 0,
    is_deferred: bool = False,
    slo: SloConfig | None = None,
) -> Ask:
    total = prompt + int(output)
    return Ask(prompt, output, num_choices, total, priority, is_deferred, slo or SloConfig())


def placed(
    wanted: Ask,
    loads: Columns,
    policy: str = "predicted_latency",
    *,
    is_flexible: bool = True,
    is_short: bool = False,
) -> Placement:
    placement = place(wanted, loads, POLICIES[policy], is_flexible=is_flexible, is_short=is_short)
    assert placement is not None
    return placement


def home(placement: Placement) -> str:
    """Where it decodes."""
    return placement.decode[0] if placement.decode else placement.prefill
