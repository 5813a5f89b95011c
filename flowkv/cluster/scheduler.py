"""Placement: filter, score, pick."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flowkv.cluster.columns import Column, Columns, Field
from flowkv.cluster.policy import Ask, Policy, Scores

_MAX_CANDIDATES = 4  # who are asked in turn to decode

_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request is prefilled, and who is to decode it, best first; nobody: the prefill instance itself."""

    prefill: str
    decode: list[str]
    ttft_s: float  # predicted
    tpot_s: float


def place(
    ask: Ask, loads: Columns, policy: Policy, *, is_flexible: bool, is_short: bool, is_begun: bool = False
) -> Placement | None:
    """The plan with the lowest score: remote prefill, or both phases on one instance. None if no instance can hold it.

    `is_short`: the first token is the last, and nobody needs to decode. `is_begun`: it goes on after output that was
    lost with another instance, and is computed again where it decodes. Unless `is_flexible` prompts go to prefill
    instances and decodes to decode instances; a mixed instance decodes what it prefills, and so does any where no
    other may decode.
    """
    able = _able(ask, loads)
    if not able.any():
        return None
    scores = policy(ask, loads)
    takers = able & (_all(loads) if is_flexible else _may_take(loads))
    if is_begun:
        whole = np.where(takers if takers.any() else able, scores.prefill + scores.decode, np.inf)
        return _placement(loads, scores, int(whole.argmin()), [])
    prefill = np.where(
        able & (_all(loads) if is_flexible else _may(loads, able, Field.IS_DECODE)), scores.prefill, np.inf
    )
    if is_short:
        return _placement(loads, scores, int(prefill.argmin()), [])
    decode = np.where(takers, scores.decode + scores.handoff, np.inf)
    local = prefill + np.where(able, scores.decode, np.inf)
    if not is_flexible:
        local[(loads.column(Field.IS_PREFILL) > 0) & np.isfinite(decode).any()] = np.inf
        prefill[loads.column(Field.IS_PREFILL) == 0] = np.inf  # others keep what they prefill
    first, second, both = int(prefill.argmin()), int(decode.argmin()), int(local.argmin())
    keeps = first == second or (_is_mixed(loads, first) and _is_mixed(loads, second))
    remote = np.inf if keeps else prefill[first] + decode[second]
    if not local[both] > remote:
        return _placement(loads, scores, both, [])
    return _placement(loads, scores, first, _best(decode, second, first))


def _placement(loads: Columns, scores: Scores, prefill: int, decode: list[int]) -> Placement:
    """Rows become names."""
    home = decode[0] if decode else prefill
    names = loads.names
    ttft_s, tpot_s = float(scores.ttft_s[prefill]), float(scores.tpot_s[home])
    return Placement(names[prefill], [names[row] for row in decode], ttft_s, tpot_s)


def _best(decode: Column, best: int, other: int) -> list[int]:
    """A few rows by score, the best first; not that of the prefill instance, which decodes if none of them can."""
    count = min(_MAX_CANDIDATES + 1, len(decode))
    few = np.argpartition(decode, count - 1)[:count]
    ordered = sorted(few.tolist(), key=lambda row: (decode[row], row))
    return [best] + [row for row in ordered if row not in (best, other) and np.isfinite(decode[row])][
        : _MAX_CANDIDATES - 1
    ]


def _able(ask: Ask, loads: Columns) -> _Mask:
    able: _Mask = (
        (loads.column(Field.IS_AVAILABLE) > 0)
        & (loads.column(Field.POOL_TOKENS) >= ask.max_total_tokens)
        & (loads.column(Field.MAX_CHOICES) >= ask.num_choices)
    )
    return able


def _is_mixed(loads: Columns, row: int) -> bool:
    return not (loads.column(Field.IS_PREFILL)[row] or loads.column(Field.IS_DECODE)[row])


def _all(loads: Columns) -> _Mask:
    return np.ones(len(loads), np.bool_)


def _may(loads: Columns, able: _Mask, other_role: Field) -> _Mask:
    """Who has not the other role; everyone, if that leaves nobody."""
    mask: _Mask = loads.column(other_role) == 0
    return mask if (mask & able).any() else _all(loads)


def _may_take(loads: Columns) -> _Mask:
    """Who decodes what another has prefilled."""
    mask: _Mask = loads.column(Field.IS_PREFILL) == 0
    return mask
