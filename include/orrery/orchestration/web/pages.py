"""HTML from values. Jinja escapes what is filled in; the policy lets a page load and run nothing but our own files."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from orrery import cost_text
from orrery.orchestration.web import addresses, bars, chart
from orrery.orchestration.web.verdict import tone

HERE = Path(__file__).resolve().parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FILES = {
    "style.css": "text/css",
    "page.js": "text/javascript",
    "theme.js": "text/javascript",
    "model.svg": "image/svg+xml",
    "verdict.svg": "image/svg+xml",
    "model-dark.svg": "image/svg+xml",
    "verdict-dark.svg": "image/svg+xml",
}
AGAIN_S = 4  # "not there yet" looks again


@lru_cache(maxsize=1)
def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "moment": moment,
        "seconds": seconds,
        "number": number,
        "tone": tone,
        "share": share,
        "metric": metric,
        "money": cost_text.money,
        "counted": cost_text.counted,
        "of_time": cost_text.of_time,
    }
    env.globals |= {
        "static": static_url,
        "to": addresses,
        "chart": chart.svg,
        "bar": bars.svg,
        "parts": cost_text.PARTS,
    }
    return env


def prepare() -> None:
    """Compile every template and read every file of ours."""
    for name in _environment().list_templates():
        _environment().get_template(name)
    for name in FILES:
        static_file(name)


def render(template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> HTMLResponse:
    """Return a page."""
    text = _environment().get_template(template).render(values)
    return HTMLResponse(text, status, headers={**HEADERS, **(headers or {})})


def not_yet(what: str, ended: str | None) -> Response:
    """Return the page for what is not there: it looks again by itself, unless the attempt has `ended` (why)."""
    if ended is None:
        return render("waiting.html", 202, {"Retry-After": str(AGAIN_S)}, what=what, again=AGAIN_S)
    return render("message.html", 404, title=f"There is no {what}", text=ended)


@lru_cache(maxsize=16)
def static_file(name: str) -> tuple[bytes, str]:
    """Return one of our files and its digest. Raises `KeyError` for any other name."""
    if name not in FILES:
        raise KeyError(name)
    data = (HERE / "static" / name).read_bytes()
    return data, hashlib.sha256(data).hexdigest()[:12]


def static_url(name: str) -> str:
    """Return the URL of one of our files; another content has another URL, so that it may be kept."""
    return f"{addresses.ours(addresses.STATIC, name=name)}?v={static_file(name)[1]}"


def moment(text: str) -> str:
    """Return an ISO time as people read it: 2013-04-02 06:15, in UTC."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError):
        return str(text or "")


def seconds(value: float | None) -> str:
    """Return a duration as people read it."""
    if value is None:
        return ""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number to so many digits, a large one in groups of three, and a dash for none."""
    if not isinstance(value, int | float):
        return "–"
    if value == int(value) and abs(value) >= 10:
        return f"{int(value):,}"
    return f"{value:.{digits}f}"


def metric(name: str) -> str:
    """Return a metric's name as people write it: AUC, log loss."""
    return name.upper() if len(name) <= 4 else name.replace("_", " ")


def share(value: float | None) -> str:
    """Return a share in per cent."""
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "–"
