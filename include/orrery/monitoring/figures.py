"""What people look at: the metric by partition with its promise, slices, and the features that moved.

One HTML page with SVG written by hand: no script and nothing from elsewhere (it is shown in a sandbox), light and
dark, and no second of matplotlib's import in a step that otherwise takes less.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orrery.monitoring import verdict
from orrery.monitoring.verdict import Policy, Seen, Sure

if TYPE_CHECKING:
    from orrery.monitoring.monitor import Health

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 240, 64, 16, 14, 34
MAX_BARS, MAX_SLICES = 15, 20
BAR, LABEL = 20, 190
# Colours that stay apart for colour-blind readers (Okabe & Ito 2008).
STYLE = """
:root { color-scheme: light dark; --line: #0072B2; --promise: #7F7F7F; --bad: #D55E00; --grid: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; padding: 0 1rem; max-width: 760px; }
h1 { font-size: 1.25rem; } h2 { font-size: 1rem; margin-top: 1.6rem; }
svg { width: 100%; height: auto; } text { fill: currentColor; font-size: 12px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
td, th { padding: .15rem .7rem .15rem 0; text-align: left; } td + td + td { text-align: right; }
.bad { color: var(--bad); }
"""


def page(
    project: str, label: str, policy: Policy, health: Health, before: Sequence[Seen | None], reasons: Sequence[str]
) -> bytes:
    """Return the page of one partition; everything that came from data is escaped."""
    title = html.escape(f"{project} {health.partition}: {health.verdict.word}")
    told = "".join(f"<li>{html.escape(r)}</li>" for r in reasons)
    scored = f"{health.rows.scored:,} rows scored by version {health.version}"
    counts = html.escape(f"{scored}; {health.rows.share_labelled:.1%} have a label ({label}) by now")
    parts = [
        f"<h1>{title}</h1><p>{counts}</p><ul>{told}</ul>",
        _by_partition(policy, [*(s for s in reversed(before) if s is not None), health.now]),
        _slices(health),
        _features(health),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"{head}{''.join(parts)}</html>".encode()


def _by_partition(policy: Policy, seen: Sequence[Seen]) -> str:
    """Return points with intervals, and the promise of the version of each partition as a step behind them."""
    ends = [e for s in seen for sure in (s.observed, s.promised) if sure is not None for e in _interval(sure)]
    if not ends:
        return ""
    low, high = min(ends), max(ends)
    room = (high - low) * 0.06 or abs(high) * 0.01 or 1.0
    low, high = low - room, high + room
    slot = (WIDTH - LEFT - RIGHT) / len(seen)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [_grid(low, high, y)]
    for place, one in enumerate(seen):
        left, middle = LEFT + place * slot, LEFT + (place + 0.5) * slot
        if one.promised is not None:
            bottom, top = (y(v) for v in _interval(one.promised))
            out.append(_rect(left, top, slot, bottom - top, "var(--promise)", 0.2))
            out.append(_line(left, y(one.promised.value), left + slot, y(one.promised.value), "var(--promise)", 1.5))
        if one.observed is not None:
            bottom, top = (y(v) for v in _interval(one.observed))
            bad = verdict.known(policy, one) and (one.loss or 0.0) >= verdict.needed(policy, one)
            colour = "var(--bad)" if bad else "var(--line)"
            out.append(_line(middle, bottom, middle, top, colour, 2))
            out.append(f'<circle cx="{middle:.1f}" cy="{y(one.observed.value):.1f}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{middle:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{html.escape(one.key)}</text>')
        out.append(f'<text x="{middle:.1f}" y="{HEIGHT - 3}" text-anchor="middle">v{html.escape(one.version)}</text>')
    metric = html.escape(policy.metric)
    note = "dots: observed, grey: promised, both with 95 % intervals; orange: worse by enough to matter"
    return f"<h2>{metric} by partition</h2>{_svg(HEIGHT, out, f'{metric} by partition')}<p>{note}</p>"


def _grid(low: float, high: float, y: object) -> str:
    assert callable(y)
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(k for k in (0.5, 1, 2, 5) if (high - low) / (step * k) <= 6)
    digits = max(0, -math.floor(math.log10(step)))
    out, value = [], math.ceil(low / step) * step
    while value <= high:
        out.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), "var(--grid)", 1))
        out.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.{digits}f}</text>')
        value += step
    return "".join(out)


def _slices(health: Health) -> str:
    slices = sorted(
        health.performance.slices, key=lambda s: (-(s.loss.value if s.loss else -math.inf), s.column, s.value)
    )
    if not slices:
        return ""
    rows = []
    for s in slices[:MAX_SLICES]:
        bad = ' class="bad"' if s.loss is not None and s.loss.low > 0 else ""
        low, high = s.observed.interval
        told = f"{s.loss.value:+.4f}" if s.loss else "–"
        cells = (s.column, s.value, f"{s.observed.rows:,}", f"{s.observed.value:.4f}", f"{low:.4f} … {high:.4f}", told)
        rows.append(f"<tr{bad}>{''.join(f'<td>{html.escape(c)}</td>' for c in cells)}</tr>")
    names = ("column", "value", "rows", health.performance.metric, "95 % interval", "loss")
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    more = f"<p>{len(slices) - MAX_SLICES} more in health.json</p>" if len(slices) > MAX_SLICES else ""
    table = f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    return f"<h2>Slices, the largest loss first</h2>{table}{more}"


def _features(health: Health) -> str:
    if health.drift is None or not health.drift.features:
        return ""
    shown = [d for d in (*health.drift.predictions, *health.drift.features) if math.isfinite(d.psi)]
    predicted = {id(d) for d in health.drift.predictions}
    shown = sorted(shown, key=lambda d: -d.psi)[:MAX_BARS]
    if not shown:
        return ""
    top = max(0.25, *(d.psi for d in shown))
    scale, out = (WIDTH - LABEL - 60) / top, []
    for place, d in enumerate(shown):
        y = TOP + place * BAR
        colour = "var(--bad)" if d.drifted else "var(--line)"
        name = f"predictions ({d.name})" if id(d) in predicted else d.name
        out.append(f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{html.escape(name[:28])}</text>')
        out.append(_rect(LABEL, y + 2, max(1.0, d.psi * scale), BAR - 6, colour))
        out.append(f'<text x="{LABEL + d.psi * scale + 6:.1f}" y="{y + 13}">{d.psi:.3f}</text>')
    note = "population stability index against the training window; orange: moved, by more than chance and 0.1"
    return f"<h2>What has moved</h2>{_svg(TOP + BAR * len(shown), out, 'population stability index')}<p>{note}</p>"


def _interval(sure: Sure) -> tuple[float, float]:
    far = verdict.reach([sure], 0.975)
    return sure.value - far, sure.value + far


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _rect(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{colour}" opacity="{opacity:g}"/>'


def _svg(height: float, parts: Sequence[str], name: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(name)}">{"".join(parts)}</svg>'
