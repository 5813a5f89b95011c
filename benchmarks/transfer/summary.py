"""From the times of single transfers to the rows of the report. Pure.

Ratios are medians over turns of two times of one turn, which the machine's other work falls on alike.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.report import percentile
from benchmarks.transfer import handover, ladder, peers
from benchmarks.transfer.geometry import LAST, RUNGS, Blocks, Rung, plan_calls, runs_of

Row = dict[str, object]

PAPER_CALL_S = 34e-6


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": percentile(values, 0.5), "max": max(values), "num": len(values)}


def median_ratio(over: Iterable[float], under: Iterable[float]) -> float:
    return percentile([a / b for a, b in zip(over, under, strict=True)], 0.5)


# --- the ladder ----------------------------------------------------------------------------------------------------


def num_calls(options: ladder.Options, num_tokens: int, rung: Rung) -> int:
    runs = runs_of(rung, options.layout.num_blocks_for(num_tokens), options.pool_blocks)
    return len(plan_calls(rung.order, runs, options.layout, options.pool_blocks).num_bytes)


def ladder_rows(options: ladder.Options, samples: Sequence[ladder.Sample]) -> list[Row]:
    """Every rung: calls, seconds, bytes a second, the share of a plain memcpy, and times the time of the last rung."""
    groups: dict[tuple[str, int, int], list[ladder.Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.backend, sample.num_tokens, sample.rung].append(sample)
    rows: list[Row] = []
    for backend, num_tokens, place in sorted(groups, key=lambda key: (options.backends.index(key[0]), *key[1:])):
        own = groups[backend, num_tokens, place]
        rung, last = RUNGS[place], groups[backend, num_tokens, RUNGS.index(LAST)]
        seconds = [sample.seconds for sample in own]
        num_bytes = options.layout.num_blocks_for(num_tokens) * options.layout.block_bytes
        mapped = [(s.mapped_memcpy_s, s.seconds) for s in own if s.mapped_memcpy_s is not None]
        rows.append(
            {
                "backend": backend,
                "num_tokens": num_tokens,
                "order": rung.order,
                "blocks": rung.blocks,
                "calls": rung.calls,
                "num_calls": num_calls(options, num_tokens, rung),
                "num_bytes": num_bytes,
                "seconds": spread(seconds),
                "memcpy_s": spread([sample.memcpy_s for sample in own]),
                "bytes_per_s": num_bytes / percentile(seconds, 0.5),
                "of_memcpy": median_ratio((s.memcpy_s for s in own), seconds),
                "of_mapped_memcpy": median_ratio(*zip(*mapped, strict=True)) if mapped else None,
                "times_last": median_ratio(seconds, (s.seconds for s in last)),
            }
        )
    return rows


def modelled_rows(options: ladder.Options) -> list[Row]:
    """NOT measured: what the paper's calls of about 34 us each would take, for every rung.

    NCCL calls of 32 KiB; a fit of the paper's Table 3, in which FlowKV-Layerwise takes 33 to 35 us for each of its
    2 * L * blocks calls, however long the prompt (arXiv 2504.03775).
    """
    rows: list[Row] = []
    for num_tokens in options.prompts:
        for rung in RUNGS:
            count = num_calls(options, num_tokens, rung)
            rows.append(
                {
                    "num_tokens": num_tokens,
                    "order": rung.order,
                    "blocks": rung.blocks,
                    "calls": rung.calls,
                    "num_calls": count,
                    "modelled_call_seconds": count * PAPER_CALL_S,
                }
            )
    return rows


# --- peers ---------------------------------------------------------------------------------------------------------


def peer_rows(options: peers.Options, samples: Sequence[peers.Sample]) -> list[Row]:
    rows: list[Row] = []
    for (num_tokens, case), seconds in _by_case(samples).items():
        num_bytes = options.layout.num_blocks_for(num_tokens) * options.layout.block_bytes
        rows.append(
            {
                "num_tokens": num_tokens,
                "name": case.name,
                "system": case.system,
                "blocks": case.blocks,
                "num_bytes": num_bytes,
                "seconds": spread(seconds),
                "bytes_per_s": num_bytes / percentile(seconds, 0.5),
                "best_bytes_per_s": num_bytes / min(seconds),
            }
        )
    return rows


def peer_ratios(samples: Sequence[peers.Sample]) -> list[Row]:
    """FlowKV against each system's best case (by median) on blocks that lie alike, as times its rate."""
    by_case = _by_case(samples)
    rows: list[Row] = []
    for (num_tokens, case), own in by_case.items():
        if case.system != "flowkv":
            continue
        rivals = {rival: seconds for (n, rival), seconds in by_case.items() if n == num_tokens and rival != case}
        for system, num_streams in (("nixl", 1), ("raw", 1), ("raw", 2)):
            comparable = {
                rival: seconds
                for rival, seconds in rivals.items()
                if rival.system == system
                and rival.num_streams == num_streams
                and rival.blocks == (Blocks.SEGMENTS if system == "raw" else case.blocks)
            }
            if comparable:
                best = min(comparable, key=lambda rival: percentile(comparable[rival], 0.5))
                ratio = median_ratio(comparable[best], own)
                rows.append(
                    {"num_tokens": num_tokens, "blocks": case.blocks, "best": best.name, "times_its_rate": ratio}
                )
    return rows


def _by_case(samples: Sequence[peers.Sample]) -> dict[tuple[int, peers.Case], list[float]]:
    """Seconds in the order of turns."""
    found: dict[tuple[int, peers.Case], list[float]] = defaultdict(list)
    for sample in samples:
        found[sample.num_tokens, sample.case].append(sample.seconds)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1].blocks, item[0][1].name)))


# --- hand-over -----------------------------------------------------------------------------------------------------


def handover_rows(options: handover.Options, samples: Sequence[handover.Sample]) -> list[Row]:
    """Milliseconds from P's first token to D's second beyond a decode step, and beyond the exposed transfer too."""
    groups: dict[tuple[str, str, int], list[handover.Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.backend, sample.condition, sample.num_tokens].append(sample)
    rows: list[Row] = []
    for (backend, condition, num_tokens), own in groups.items():
        step_s = options.decode_step_s
        rows.append(
            {
                "backend": backend,
                "condition": condition,
                "num_tokens": num_tokens,
                "num": len(own),
                "handover_s": _percentiles([s.second_token_s - step_s for s in own]),
                "beyond_exposed_s": _percentiles([s.second_token_s - step_s - s.exposed_s for s in own]),
                "exposed_s": _percentiles([s.exposed_s for s in own]),
                "transfer_s": _percentiles([s.transfer_s for s in own]),
                "exposed_fraction": percentile([s.exposed_s / s.transfer_s for s in own], 0.5),
                "num_calls": percentile([s.num_calls for s in own], 0.5),
            }
        )
    return rows


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}
