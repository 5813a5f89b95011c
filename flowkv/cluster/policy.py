"""Scores of all instances for a request, the lower the better. A new policy: a function here, a line in POLICIES.

A plan for a request is an instance that computes the prompt and one that decodes. What a plan costs falls into what it
costs where the prompt is computed, where the request decodes, and on the way between, so each instance is scored for
either phase alone, and the best plan is the best of one and the best of the other, or the best of both together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flowkv.cluster.columns import Column, Columns, Field
from flowkv.config import SloConfig
from flowkv.cost import prefill_pairs

_TTFT_MARGIN = 0.8  # of the bound: predictions err
_TPOT_MARGIN = 0.97  # of the bound: steps are kept within a little less (`SloConfig.max_step_s`)
_LATE_S = 1e4  # what being late by once the bound weighs: more than any latency
_NO_ROOM = 10.0  # times the bound: to wait for blocks without knowing how long
_LAST_CHUNK_TOKENS = 512  # what is left to move when a prompt is computed, about
_GAP_MARGIN = 2.0  # times as long as expected the step may last that a handoff has to wait for
_OFF_ROLE = 1.1  # what the other phase costs on an instance that has a role


@dataclass(frozen=True, slots=True)
class Ask:
    """What placement knows of a request."""

    num_prompt_tokens: int
    num_output_tokens: float  # of one choice, predicted
    num_choices: int
    max_total_tokens: int  # that one choice may come to hold, prompt included
    priority: int
    is_deferred: bool  # it comes after all others
    slo: SloConfig


@dataclass(frozen=True, slots=True)
class Scores:
    """[instances] each: what a policy says of a request, and what it predicts."""

    prefill: Column
    decode: Column
    handoff: Column  # beside `decode`, where the prompt is computed elsewhere
    ttft_s: Column
    tpot_s: Column


Policy = Callable[[Ask, Columns], Scores]


def predicted_latency(ask: Ask, loads: Columns) -> Scores:
    """Predicted latency and the delay of others, where that keeps the SLO; else by how much it is missed.

    A prompt delays the choices that decode beside its chunks, a decode all choices of its steps.
    """
    of, output = loads.column, ask.num_output_tokens
    ttft_s, own_s = _ttft_s(ask, loads)
    beside = _beside_chunks(ask, loads)
    tpot_s, added_s = _tpot_s(ask, loads, beside)
    most_tpot_s, _ = _tpot_s(ask, loads, np.maximum(beside, of(Field.IS_PREFILL)))
    full_s = of(Field.FULL_STEP_S)
    stretched = 1 - np.divide(of(Field.STEP_S), full_s, out=np.ones_like(full_s), where=full_s > 0)
    prefill = ttft_s + own_s * of(Field.DECODING) * stretched
    decode = output * (tpot_s + added_s * of(Field.HOMES))
    prefill *= np.where(of(Field.IS_DECODE) > 0, _OFF_ROLE, 1.0)
    decode *= np.where(of(Field.IS_PREFILL) > 0, _OFF_ROLE, 1.0)
    prefill += _LATE_S * _lateness(ttft_s, ask.slo.ttft_s, _TTFT_MARGIN)
    late = _lateness(most_tpot_s, ask.slo.tpot_s, _TPOT_MARGIN)
    decode += _LATE_S * (late + _no_room(ask, loads))
    gap_s = _handoff_s(ask, loads, beside)
    most_gap_s = _handoff_s(ask, loads, np.maximum(beside, of(Field.IS_PREFILL)))
    late_beside = (
        _lateness(most_tpot_s + _GAP_MARGIN * most_gap_s / max(1.0, output - 1), ask.slo.tpot_s, _TPOT_MARGIN) - late
    )
    return Scores(prefill, decode, gap_s + _LATE_S * late_beside, ttft_s, tpot_s)


def least_loaded(ask: Ask, loads: Columns) -> Scores:
    """Fewest prompt tokens in the queue, fewest choices: what a router does that predicts nothing."""
    ttft_s, _ = _ttft_s(ask, loads)
    tpot_s, _ = _tpot_s(ask, loads, _beside_chunks(ask, loads))
    off_prefill = _LATE_S * loads.column(Field.IS_DECODE)
    off_decode = _LATE_S * loads.column(Field.IS_PREFILL)
    queued = loads.column(Field.QUEUE_S) / np.maximum(loads.column(Field.TOKEN_S), 1e-12)
    decode = loads.column(Field.HOMES) + off_decode + _LATE_S * _no_room(ask, loads)
    return Scores(queued + off_prefill, decode, np.zeros_like(decode), ttft_s, tpot_s)


POLICIES: dict[str, Policy] = {
    "predicted_latency": predicted_latency,
    "least_loaded": least_loaded,
}


def _ttft_s(ask: Ask, loads: Columns) -> tuple[Column, Column]:
    """(TTFT, of which the prompt itself), were the prompt computed there. What is more urgent does not queue."""
    prompt = ask.num_prompt_tokens
    own_s = prompt * loads.column(Field.TOKEN_S) + prefill_pairs(0, prompt) * loads.column(Field.PAIR_S)
    queue_s = loads.column(Field.QUEUE_S) if ask.priority >= 0 else loads.column(Field.STEP_S)
    if ask.is_deferred:
        queue_s = queue_s + loads.column(Field.DEFERRED_S)
    return queue_s + own_s, own_s


def _tpot_s(ask: Ask, loads: Columns, beside: Column) -> tuple[Column, Column]:
    """(TPOT, of which this request adds for everyone), were it decoded there, a share of its steps beside chunks."""
    of = loads.column
    tokens = ask.num_prompt_tokens + ask.num_choices * ask.num_output_tokens / 2
    added_s = ask.num_choices * of(Field.CHOICE_S) + tokens * of(Field.SLOT_S)
    step_s = (
        of(Field.BASE_S) + of(Field.HOMES) * of(Field.CHOICE_S) + of(Field.HOME_TOKENS) * of(Field.SLOT_S) + added_s
    )
    most_s = ask.slo.max_step_s  # chunks shrink to that once something decodes beside them
    full_s = of(Field.FULL_STEP_S) if most_s is None else np.minimum(of(Field.FULL_STEP_S), most_s)
    stretched_s = np.maximum(0.0, full_s - step_s)
    return step_s + beside * stretched_s, added_s


def _handoff_s(ask: Ask, loads: Columns, beside: Column) -> Column:
    """Between the first token and the second: the last chunk's KV moves, then the step under way there ends."""
    of = loads.column
    step_s = beside * of(Field.FULL_STEP_S) + (1 - beside) * of(Field.STEP_S)
    return min(ask.num_prompt_tokens, _LAST_CHUNK_TOKENS) * of(Field.WRITE_S) + step_s / 2


def _beside_chunks(ask: Ask, loads: Columns) -> Column:
    """Share of a request's steps that will have a chunk in them: as lately, or more where more prompts wait.

    (Where lateness is judged it is all of them on an instance whose role that is.)
    """
    decode_s = np.maximum(1e-9, ask.num_output_tokens * loads.column(Field.STEP_S))
    queued = np.minimum(1.0, loads.column(Field.QUEUE_S) / np.maximum(decode_s, loads.column(Field.FULL_STEP_S)))
    return np.maximum(loads.column(Field.PREFILL_FRACTION), queued)


def _lateness(seconds: Column, bound_s: float | None, margin: float) -> Column:
    """How many times the bound it is beyond the bound."""
    if bound_s is None:
        return np.zeros_like(seconds)
    return np.maximum(0.0, seconds / (margin * bound_s) - 1)


def _no_room(ask: Ask, loads: Columns) -> Column:
    """0 where it fits; else more the less it does."""
    needed = ask.num_prompt_tokens + ask.num_choices * ask.num_output_tokens
    missing = needed - loads.column(Field.ROOM_TOKENS)
    return np.where(missing > 0, _NO_ROOM * (1 + missing / loads.column(Field.POOL_TOKENS)), 0.0)
