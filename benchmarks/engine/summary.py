"""What is reported of the steps: medians, floors, how decode grows with context."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import linear_regression, median
from typing import Any

from rich.console import Console

from benchmarks.engine.cells import DECODE, PREFILL, Cell, Plan
from benchmarks.engine.clocks import PARTS
from benchmarks.engine.instance import Step
from benchmarks.engine.roofline import Machine, Model
from benchmarks.report import print_table


def figures(cell: Cell, steps: Sequence[Step], model: Model, machine: Machine) -> dict[str, Any]:
    """Medians over the steps of a cell."""
    memory_s = median(model.read_bytes(step) / machine.bandwidth for step in steps)
    matrix_s = median(model.flops(step) / machine.matrix_rate for step in steps)
    seconds = {name: median(step.seconds[name] for step in steps) for name in ("step", "idle", *PARTS)}
    return {
        **cell._asdict(),
        "num_steps": len(steps),
        "step_s": seconds["step"],
        "idle_s": seconds["idle"],
        "parts_s": {name: seconds[name] for name in PARTS},
        "overhead_fraction": (seconds["scheduling"] + seconds["messages"]) / seconds["step"],
        "tokens_per_s": steps[0].num_tokens / seconds["step"],
        "kv_bytes": median(model.kv_bytes(step) for step in steps),
        "memory_floor_s": memory_s,
        "matrix_floor_s": matrix_s,
        "floor_fraction": max(memory_s, matrix_s) / seconds["step"],
        "steps_s": [step.seconds["step"] for step in steps],
    }


def slopes(cells: Sequence[dict[str, Any]], machine: Machine) -> list[dict[str, Any]]:
    """How decode steps of one batch size grow with the KV that they read: seconds a byte, by least squares and between
    the two longest contexts; as multiples of what reading a byte takes."""
    found = []
    for size in sorted({cell["size"] for cell in cells if cell["phase"] == DECODE}):
        points = sorted((c["kv_bytes"], c["step_s"]) for c in cells if (c["phase"], c["size"]) == (DECODE, size))
        if len(points) > 1:
            slope = linear_regression(*zip(*points, strict=True)).slope
            (bytes_before, before_s), (bytes_after, after_s) = points[-2:]
            last = (after_s - before_s) / (bytes_after - bytes_before)
            times = {"times_read": slope * machine.bandwidth, "last_times_read": last * machine.bandwidth}
            found.append({"batch": size, "seconds_a_byte": slope, **times})
    return found


def report(
    plan: Plan, model: Model, machine: Machine, steps: dict[Cell, list[Step]], skipped: Sequence[Cell]
) -> dict[str, Any]:
    cells = [figures(cell, measured, model, machine) for cell, measured in sorted(steps.items())]
    return {
        "plan": asdict(plan),
        "model": asdict(model),
        "machine": {**asdict(machine), "bandwidth": machine.bandwidth, "matrix_rate": machine.matrix_rate},
        "cells": cells,
        "skipped": [cell._asdict() for cell in skipped],
        "slopes": slopes(cells, machine),
    }


def show(console: Console, results: dict[str, Any], title: str) -> None:
    machine = results["machine"]
    rows = [[str(m), f"{max(rates) / 1e9:.0f}"] for m, rates in machine["matrix_rates"].items()]
    console.print(f"memory: {machine['bandwidth'] / 1e9:.1f} GB/s read; products with packed weights:", highlight=False)
    print_table(console, ["rows", "GFLOP/s"], rows)
    for phase, first in ((DECODE, "batch"), (PREFILL, "tokens")):
        cells = [cell for cell in results["cells"] + results["skipped"] if cell["phase"] == phase]
        rows = [row(cell) for cell in sorted(cells, key=lambda cell: (cell["size"], cell["context"]))]
        header = [first, "context", "steps", "ms", *PARTS, "idle", "floor ms", "floor of", "share"]
        print_table(console, header, rows, f"{phase}, {title}: ms and share of a step, medians")
    for slope in results["slopes"]:
        console.print(
            "batch {batch}: a step grows with context {times_read:.2f} times as fast as reading the KV takes"
            " ({last_times_read:.2f} between the two longest)".format_map(slope),
            highlight=False,
        )


def row(cell: dict[str, Any]) -> list[str]:
    names = [str(cell["size"]), str(cell["context"])]
    if "step_s" not in cell:
        return [*names, *["-"] * (len(PARTS) + 6)]
    step_s, memory_s, matrix_s = cell["step_s"], cell["memory_floor_s"], cell["matrix_floor_s"]
    parts = [f"{seconds * 1e3:.2f} {seconds / step_s:4.0%}" for seconds in cell["parts_s"].values()]
    floor = [f"{max(memory_s, matrix_s) * 1e3:.2f}", "memory" if memory_s > matrix_s else "matrix"]
    share = f"{cell['floor_fraction']:.0%}"
    return [*names, str(cell["num_steps"]), f"{step_s * 1e3:.2f}", *parts, f"{cell['idle_s'] * 1e3:.2f}", *floor, share]
