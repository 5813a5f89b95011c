"""What a phase has cost its clients. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.chaos.havoc import Deed
from benchmarks.chaos.load import Outcome
from benchmarks.report import summarize

NUM_LONGEST = 8  # waits that are told one by one
DEEDS_BEFORE_S = 2.0
KILL, STOP = "SIGKILL", "SIGSTOP"


@dataclass(frozen=True)
class Seen:
    """A request: what its client saw, and what the server's `/requests` says of it."""

    outcome: Outcome
    record: dict[str, Any]

    @property
    def num_hits(self) -> int:
        """How often an instance that held it was lost."""
        return int(self.record["num_attempts"]) - 1


def seen(outcomes: Iterable[Outcome], records: Iterable[dict[str, Any]]) -> list[Seen]:
    """What has no record was never accepted."""
    by_id = {str(record["request_id"]): record for record in records}
    none = {"num_attempts": 1, "output_tokens": 0, "phases": []}
    return [Seen(outcome, by_id.get(f"{outcome.request_id}-0", none)) for outcome in outcomes]


def phase_figures(requests: Sequence[Seen], deeds: Sequence[Deed]) -> dict[str, Any]:
    """Seconds are those of clients, but `replaced_s`: from a kill until the successor was in service."""
    outcomes = [one.outcome for one in requests]
    hit, others = [one for one in requests if one.num_hits], [one for one in requests if not one.num_hits]
    seconds = max(outcome.ended_s for outcome in outcomes) - min(outcome.began_s for outcome in outcomes)
    kills = [deed for deed in deeds if deed.what == KILL]
    of_controller = [deed for deed in kills if deed.victim.startswith("controller")]
    of_instances = [deed for deed in kills if deed not in of_controller]
    return {
        "seconds": seconds,
        "num_requests": len(requests),
        "num_equal": sum(outcome.problem is None for outcome in outcomes),
        "num_differing": sum(outcome.problem is not None and outcome.is_whole for outcome in outcomes),
        "num_broken": sum(not outcome.is_whole for outcome in outcomes),
        "problems": [outcome.problem for outcome in outcomes if outcome.problem is not None],
        "num_kills": len(of_instances),
        "num_controller_kills": len(of_controller),
        "num_pauses": sum(deed.what == STOP for deed in deeds),
        "num_hit": len(hit),
        "hits": {str(times): count for times, count in sorted(Counter(one.num_hits for one in hit).items())},
        "longest_gap_s": {"hit": summarize(_gaps_s(hit)), "others": summarize(_gaps_s(others))},
        "ttft_s": {"all": _ttft_s(requests), "hit": _ttft_s(hit), "others": _ttft_s(others)},
        "output_tokens_per_s": sum(one.record["output_tokens"] for one in requests) / seconds,
        "replaced_s": _took_s(of_instances),
        "controller_replaced_s": _took_s(of_controller),
        "longest_gaps": _longest([(_gap(one.outcome), one) for one in requests], deeds),
        "longest_ttfts": _longest([(_first(one.outcome), one) for one in requests], deeds),
    }


class Gap(NamedTuple):
    """In which a client had nothing new."""

    seconds: float
    began_s: float


def _gap(outcome: Outcome) -> Gap | None:
    """The longest between two events that brought text; None where there are no two."""
    return max((Gap(after - before, before) for before, after in pairwise(outcome.text_s)), default=None)


def _first(outcome: Outcome) -> Gap | None:
    """The wait for the first event that brought text."""
    return Gap(outcome.text_s[0] - outcome.began_s, outcome.began_s) if outcome.text_s else None


def _gaps_s(requests: Iterable[Seen]) -> list[float]:
    """The longest one of each."""
    return [gap.seconds for one in requests if (gap := _gap(one.outcome)) is not None]


def _ttft_s(requests: Iterable[Seen]) -> dict[str, float] | None:
    return summarize([first.seconds for one in requests if (first := _first(one.outcome)) is not None])


def _took_s(deeds: Iterable[Deed]) -> dict[str, float] | None:
    return summarize([deed.took_s for deed in deeds if deed.took_s is not None])


def _longest(waits: Iterable[tuple[Gap | None, Seen]], deeds: Sequence[Deed]) -> list[dict[str, Any]]:
    """The longest of all, with what was done shortly before or in it, and where the server says the time went."""
    there = [(gap, one) for gap, one in waits if gap is not None]
    return [
        {
            "seconds": gap.seconds,
            "after_s": gap.began_s - one.outcome.began_s,
            "num_hits": one.num_hits,
            "deeds_before_it_s": {
                f"{deed.what} {deed.victim}": gap.began_s - deed.at_s
                for deed in deeds
                if gap.began_s - DEEDS_BEFORE_S < deed.at_s < gap.began_s + gap.seconds
            },
            "phases": one.record["phases"],
        }
        for gap, one in sorted(there, key=lambda item: item[0].seconds, reverse=True)[:NUM_LONGEST]
    ]
