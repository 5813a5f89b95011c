"""Findings on the terminal, or as JSON."""

import sys
from collections import Counter
from collections.abc import Iterable

import msgspec
from rich.console import Console
from rich.text import Text

from flowkv.doctor.finding import Finding, Level

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
_INDENT = " " * 6


def show(findings: Iterable[Finding]) -> int:
    """Each as it comes, then how many of each level; the exit status: 1 where something fails."""
    console = Console(highlight=False, soft_wrap=True)
    counts: Counter[Level] = Counter()
    for finding in findings:
        counts[finding.level] += 1
        console.print(
            Text.assemble(
                (f"{finding.level:<6}", _STYLES[finding.level]), (f"{finding.check:<15}", "bold"), finding.text
            )
        )
        if finding.advice:
            console.print(Text(f"{_INDENT}{'':<15}-> {finding.advice}"))
    console.print(Text("\n" + ", ".join(f"{counts[level]} {level}" for level in Level)))
    return int(counts[Level.FAIL] > 0)


def show_json(findings: Iterable[Finding]) -> int:
    """One object: whether all is well, and the findings."""
    found = list(findings)
    fails = any(finding.level is Level.FAIL for finding in found)
    document = msgspec.json.encode({"ok": not fails, "findings": found})
    sys.stdout.write(msgspec.json.format(document, indent=2).decode() + "\n")
    return int(fails)
