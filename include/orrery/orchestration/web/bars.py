"""Where a training's time went, as one bar: an inline SVG. Numbers in, marks out; colours are CSS's.

Attributes only, no style: the page's policy allows none. What the colours say is also in the bar's title, in words.
"""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup, escape

from orrery.cost_text import PARTS, of_time

LEAST = 1.0  # pixels of a part that took any time


def svg(seconds: Mapping[str, float], width: int, height: int) -> Markup:
    """Return the bar, its parts in proportion to the wall time, or nothing when there was none. Sizes in CSS pixels."""
    shown = {part: seconds[part] for part in PARTS if part != "queued" and seconds[part] > 0}
    if not shown:
        return Markup("")
    text = escape(of_time(seconds))
    rects, left = [], 0.0
    scale = (width - LEAST * len(shown)) / sum(shown.values())
    for part, value in shown.items():
        wide = LEAST + value * scale
        rects.append(f'<rect class="part {part}" x="{left:.1f}" y="0" width="{wide:.1f}" height="{height}"/>')
        left += wide
    head = f'<svg class="bar" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    return Markup(f"{head}<title>{text}</title>{''.join(rects)}</svg>")  # noqa: S704  numbers, and one escaped text
