"""The page of a search: how it went, which parameters made the difference, and every trial. SVG by hand, no script."""

from __future__ import annotations

import html
from collections.abc import Sequence

from orrery.spec import METRICS
from orrery.tuning.outcome import Outcome

FEWEST = 4  # complete trials, for shares of parameters to mean anything
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 260, 64, 16, 14, 34
BAR, LABEL = 22, 150
# Colours that stay apart for colour-blind readers (Okabe & Ito 2008).
STYLE = """
:root { color-scheme: light dark; --line: #0072B2; --best: #D55E00; --grey: #7F7F7F; --grid: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; padding: 0 1rem; max-width: 760px; }
h1 { font-size: 1.25rem; } h2 { font-size: 1rem; margin-top: 1.6rem; }
svg { width: 100%; height: auto; } text { fill: currentColor; font-size: 12px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
td, th { padding: .15rem .7rem .15rem 0; text-align: left; white-space: nowrap; } .chosen { font-weight: 600; }
"""


def page(
    title: str, reasons: Sequence[str], trials: Sequence[Outcome], chosen: Outcome, weights: dict[str, float]
) -> bytes:
    """Return the page; everything that came from a project is escaped. `weights`: share by parameter."""
    told = "".join(f"<li>{html.escape(r)}</li>" for r in reasons)
    title = html.escape(title)
    parts = [f"<h1>{title}</h1><ul>{told}</ul>", _history(trials), _weights(weights), _table(trials, chosen)]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"{head}{''.join(parts)}</html>".encode()


def _history(trials: Sequence[Outcome]) -> str:
    """Every complete trial as a dot, and the best so far as a line."""
    done = [(t.number, t.value) for t in trials if t.value is not None]
    metric, higher = trials[0].metric, METRICS[trials[0].metric]
    values = [value for _, value in done]
    low, high = min(values), max(values)
    reach = (high - low) or abs(high) or 1.0
    low, high = low - 0.05 * reach, high + 0.05 * reach
    last = max(1, len(trials) - 1)

    def x(number: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * number / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    dots = "".join(
        f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="4" fill="var(--line)"><title>trial {n}: {v:.5g}</title></circle>'
        for n, v in done
    )
    best, line = values[0], []
    for number, value in done:
        best = max(best, value) if higher else min(best, value)
        line.append(f"{x(number):.1f},{y(best):.1f}")
    marks = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="var(--grid)"/>'
        f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>'
        for v in (min(values), max(values))
    )
    names = (
        f'<text x="{LEFT}" y="{HEIGHT - 10}">trial 0, the defaults</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">trial {len(trials) - 1}</text>'
    )
    lost = len(trials) - len(done)
    note = f"; {lost} pruned or failed, not shown" if lost else ""
    return (
        f"<h2>{html.escape(metric)} on the tune part by trial, and the best so far{note}</h2>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{marks}'
        f'<polyline points="{" ".join(line)}" fill="none" stroke="var(--best)" stroke-width="2"/>{dots}{names}</svg>'
    )


def _weights(weights: dict[str, float]) -> str:
    """A bar per parameter."""
    title = "<h2>Which parameters made the difference (PED-ANOVA)</h2>"
    if not weights:
        return f"{title}<p>Too few trials came to their end, or they were all alike.</p>"
    height, widest = BAR * len(weights) + 8, max(weights.values()) or 1.0
    bars = "".join(
        f'<text x="{LABEL - 8}" y="{BAR * i + 18}" text-anchor="end">{html.escape(name)}</text>'
        f'<rect x="{LABEL}" y="{BAR * i + 6}" width="{(WIDTH - LABEL - 70) * share / widest:.1f}" height="{BAR - 8}" '
        f'fill="var(--line)"/><text x="{LABEL + (WIDTH - LABEL - 70) * share / widest + 6:.1f}" y="{BAR * i + 18}">'
        f"{share:.0%}</text>"
        for i, (name, share) in enumerate(weights.items())
    )
    return f'{title}<svg viewBox="0 0 {WIDTH} {height}" role="img">{bars}</svg>'


def _table(trials: Sequence[Outcome], chosen: Outcome) -> str:
    names = list(trials[0].params)
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ("trial", trials[0].metric, *names, "epochs"))
    return f'<h2>All trials</h2><div class="wide"><table><tr>{head}</tr>{_rows(trials, chosen, names)}</table></div>'


def _rows(trials: Sequence[Outcome], chosen: Outcome, names: Sequence[str]) -> str:
    rows = []
    for t in trials:
        value = f"{t.value:.5f}" if t.value is not None else t.state
        cells = [str(t.number), value, *(_shown(t.params.get(n)) for n in names), str(len(t.epochs) or "")]
        kind = ' class="chosen"' if t.number == chosen.number else ""
        why = f' title="{html.escape(t.why, quote=True)}"' if t.why else ""
        rows.append(f"<tr{kind}{why}>{''.join(f'<td>{html.escape(c)}</td>' for c in cells)}</tr>")
    return "".join(rows)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
