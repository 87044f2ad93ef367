"""The primary metric by partition, with what was promised: an inline SVG. Numbers in, marks out; colours are CSS's.

Every partition has a slot of equal width. The band is the promised 95 % interval, the dot what was observed, with
its interval as whiskers; a change of the model version has a line and its number. Attributes only, no style:
the page's policy allows none. Shapes differ by verdict, so that colour is not all that tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 30


def svg(rows: Sequence[Mapping[str, Any]], metric: str, width: int, height: int, ident: str) -> Markup:
    """Return the chart, or nothing when no row has a number. `width` and `height` are in CSS pixels at full size."""
    rows = [r for r in rows if _finite(r["observed"])]
    if not rows:
        return Markup("")
    scale = _Scale(rows, width, height)
    title = f"{metric} by partition, {rows[0]['partition']} to {rows[-1]['partition']}, with what was promised"
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-labelledby="{ident}-title"><title id="{ident}-title">{escape(title)}</title>',
        *_grid(scale),
        *(_band(scale, i, r) for i, r in enumerate(rows)),
        *_versions(scale, rows),
        _line(scale, rows),
        *(_point(scale, i, r) for i, r in enumerate(rows)),
        *_labels(scale, rows),
        "</svg>",
    ]
    return Markup("".join(parts))  # noqa: S704  every text in it is escaped, the rest are numbers


class _Scale:
    """Where a slot and a value are, in pixels."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], width: int, height: int) -> None:
        names = ("observed", "observed_low", "observed_high", "promised", "promised_low", "promised_high")
        values = [float(r[n]) for r in rows for n in names if _finite(r.get(n))]
        low, high = min(values), max(values)
        room = max((high - low) * 0.08, abs(high) * 0.005, 1e-9)
        self.ticks = ticks(low - room, high + room, 5 if height > 200 else 4)
        self.low, self.high = min(low - room, self.ticks[0]), max(high + room, self.ticks[-1])
        self.width, self.height, self.count = width, height, len(rows)
        self.slot = (width - LEFT - RIGHT) / len(rows)

    def x(self, i: float) -> float:
        return round(LEFT + (i + 0.5) * self.slot, 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.height - BOTTOM - share * (self.height - TOP - BOTTOM), 1)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers within low..high, about `count` of them, at least two."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    while True:
        found = [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(found) >= 2:
            return found
        step /= 2


def _grid(scale: _Scale) -> list[str]:
    digits = max(0, min(6, 1 - math.floor(math.log10(scale.ticks[1] - scale.ticks[0]))))
    digits = digits if any(round(t, digits - 1) != t for t in scale.ticks) else max(0, digits - 1)
    return [
        f'<line class="grid" x1="{LEFT}" x2="{scale.width - RIGHT}" y1="{scale.y(t)}" y2="{scale.y(t)}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{scale.y(t) + 4}" text-anchor="end">{t:.{digits}f}</text>'
        for t in scale.ticks
    ]


def _band(scale: _Scale, i: int, row: Mapping[str, Any]) -> str:
    left, width = round(scale.x(i) - scale.slot / 2, 1), round(scale.slot + 0.1, 1)
    out = ""
    low, high = row.get("promised_low"), row.get("promised_high")
    if _finite(low) and _finite(high):
        top, bottom = scale.y(float(high)), scale.y(float(low))
        out += f'<rect class="band" x="{left}" y="{top}" width="{width}" height="{max(1.0, round(bottom - top, 1))}"/>'
    if _finite(row.get("promised")):
        y = scale.y(float(row["promised"]))
        out += f'<line class="promised" x1="{left}" x2="{round(left + width, 1)}" y1="{y}" y2="{y}"/>'
    return out


def _versions(scale: _Scale, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    out, free = [], 0.0
    for i, row in enumerate(rows):
        if not row["version"] or (i and rows[i - 1]["version"] == row["version"]):
            continue
        x = round(scale.x(i) - scale.slot / 2, 1)
        if i:
            out.append(f'<line class="change" x1="{x}" x2="{x}" y1="{TOP - 14}" y2="{scale.height - BOTTOM}"/>')
        text = f"v{row['version']}"[:12]
        if x >= free:
            out.append(f'<text class="version" x="{x + 5}" y="{TOP - 10}">{escape(text)}</text>')
            free = x + 12 + 7 * len(text)
    return out


def _line(scale: _Scale, rows: Sequence[Mapping[str, Any]]) -> str:
    points = " ".join(f"{scale.x(i)},{scale.y(float(r['observed']))}" for i, r in enumerate(rows))
    return f'<polyline class="observed" points="{points}"/>'


def _point(scale: _Scale, i: int, row: Mapping[str, Any]) -> str:
    x, y = scale.x(i), scale.y(float(row["observed"]))
    low, high = row.get("observed_low"), row.get("observed_high")
    whisker = ""
    if _finite(low) and _finite(high):
        whisker = f'<line class="whisker" x1="{x}" x2="{x}" y1="{scale.y(float(high))}" y2="{scale.y(float(low))}"/>'
    if row["verdict"] == "retrain":
        mark = f'<path class="mark bad" d="M{x} {y - 7}L{x + 7} {y}L{x} {y + 7}L{x - 7} {y}Z"/>'
    elif row["verdict"] == "watch":
        mark = f'<rect class="mark attention" x="{x - 5}" y="{y - 5}" width="10" height="10"/>'
    else:
        mark = f'<circle class="mark good" cx="{x}" cy="{y}" r="4.5"/>'
    return f"<g><title>{escape(_said(row))}</title>{whisker}{mark}</g>"


def _said(row: Mapping[str, Any]) -> str:
    text = f"{row['partition']}: {float(row['observed']):.4f}"
    if _finite(row.get("promised")):
        text += f", promised {float(row['promised']):.4f}"
    return f"{text}, version {row['version'] or '?'}, verdict {row['verdict']}"


def _labels(scale: _Scale, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    longest = max(len(str(r["partition"])) for r in rows)
    every = max(1, math.ceil((6.6 * min(longest, 16) + 8) / scale.slot))
    y = scale.height - BOTTOM + 18
    out = []
    for i in range(len(rows) - 1, -1, -every):
        x = max(LEFT - 20.0, min(scale.x(i), scale.width - RIGHT - 3.3 * min(longest, 16)))
        text = escape(str(rows[i]["partition"])[:16])
        out.append(f'<text class="tick" x="{round(x, 1)}" y="{y}" text-anchor="middle">{text}</text>')
    return out


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
