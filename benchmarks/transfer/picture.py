"""The ladder as a picture: `python -m benchmarks.transfer.picture docs/figures/transfer.json docs/figures/ladder.svg`.

One bar a rung for one prompt length over `shm`: the time, with the number of calls beside it, and the plain memcpy of
the same run as a line. Nothing modelled is drawn.
"""

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.report import percentile

_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _STEP = 840, 262, 190, 78, 20, 30
_COLOURS = {"per layer": "#8c96a8", "block-major": "#2f6fde"}
_TEXT, _FAINT, _LIMIT = "#1f2430", "#6b7383", "#c2410c"

Row = dict[str, Any]


def draw(report: dict[str, Any], backend: str = "shm", num_tokens: int | None = None) -> str:
    """An SVG of the rungs of one backend; of the longest prompt in the report where none is named.

    BenchmarkError where the report has no such rungs.
    """
    rows: list[Row] = [row for row in report.get("ladder", {}).get("rows", []) if row["backend"] == backend]
    num_tokens = num_tokens or max((row["num_tokens"] for row in rows), default=0)
    rows = [row for row in rows if row["num_tokens"] == num_tokens]
    if not rows:
        raise BenchmarkError(f"the report has no ladder over {backend} for {num_tokens} tokens")
    memcpy_s = percentile([row["memcpy_s"]["median"] for row in rows], 0.5)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(memcpy_s, *(row["seconds"]["median"] for row in rows))
    bottom = _TOP + _STEP * len(rows)
    bars = [_bar(row, _TOP + _STEP * i, scale) for i, row in enumerate(rows)]
    return _frame(rows[0], report, bottom, [*bars, *_limit(memcpy_s, scale, bottom)])


def _bar(row: Row, top: int, scale: float) -> str:
    width, middle = row["seconds"]["median"] * scale, top + _BAR - 5
    name = f"{row['order']}, {row['blocks']}, {row['calls']}"
    calls = f"{row['num_calls']:,} call{'s' if row['num_calls'] > 1 else ''}"
    figures = f"{row['seconds']['median'] * 1000:.1f} ms, {row['bytes_per_s'] / 1e9:.1f} GB/s"
    inside = f'<text x="{_LEFT + 8}" y="{middle}" fill="#fff">{calls}</text>'
    return (
        f'<text x="{_LEFT - 10}" y="{middle}" text-anchor="end" fill="{_TEXT}">{escape(name)}</text>'
        f'<rect x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_BAR}" rx="2" fill="{_COLOURS[row["order"]]}"/>'
        f'{inside}<text x="{_LEFT + width + 8:.1f}" y="{middle}" fill="{_TEXT}">{figures}</text>'
    )


def _limit(memcpy_s: float, scale: float, bottom: int) -> list[str]:
    x = f"{_LEFT + memcpy_s * scale:.1f}"
    return [
        f'<line x1="{x}" y1="{_TOP - 8}" x2="{x}" y2="{bottom}" stroke="{_LIMIT}" stroke-dasharray="4 3"/>',
        f'<text x="{x}" y="{bottom + 14}" text-anchor="middle" fill="{_LIMIT}">'
        f"one plain memcpy: {memcpy_s * 1000:.1f} ms</text>",
    ]


def _frame(row: Row, report: dict[str, Any], bottom: int, parts: list[str]) -> str:
    environment = report.get("environment", {})
    title = f"One prompt of {row['num_tokens']:,} tokens, {row['num_bytes'] / 2**20:,.0f} MiB of KV, from P to D"
    subtitle = f"Llama-3.1-8B, between two processes over {row['backend']}; median time, shorter is better"
    machine = f"{environment.get('cpu', 'unknown')}, {environment.get('cores', '?')} cores"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 46}" width="{_WIDTH}" '
        f'font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="16" y="28" font-size="18" font-weight="600" fill="{_TEXT}">{escape(title)}</text>\n'
        f'<text x="16" y="49" fill="{_FAINT}">{escape(subtitle)}</text>\n'
        + "\n".join(parts)
        + f'\n<text x="16" y="{bottom + 36}" font-size="11" fill="{_FAINT}">{escape(machine)}</text>\n</svg>\n'
    )


def main(source: str, target: str) -> None:
    try:
        Path(target).write_text(draw(json.loads(Path(source).read_text())))
    except (OSError, ValueError, BenchmarkError) as error:
        sys.exit(f"benchmarks.transfer.picture: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.transfer.picture REPORT.json PICTURE.svg")
    main(*sys.argv[1:])
