"""What trainings cost, as tables for `orrery cost`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

SPACE = "\N{NO-BREAK SPACE}"
# Parts of the time as people read them, in this order.
PARTS = {
    "useful": "useful",
    "startup": "start-up",
    "evaluating": "evaluating",
    "checkpointing": "saving",
    "lost": "lost",
    "other": "other",
    "queued": "queued before",
}


def trainings(rows: Sequence[Mapping[str, Any]], champion: str | None) -> Table:
    """Return a table of trainings, one per row; the champion's version has a star."""
    table = _table(("version", "window", "attempts"), ("wall", "goodput", "cost", "saved"))
    for row in rows:
        names = ", ".join(f"{v}★" if v == champion else v for v in row["versions"])
        table.add_row(
            escape(names) or ("–" if row["finished"] else "not done"),
            escape(row["key"]),
            counted(row),
            span(row["seconds"]["wall"]),
            share(row["goodput"]),
            money(row["cost"], row["unpriced"]),
            money(row["saved"]),
            of_time(row["seconds"]),
        )
    return table


def attempts(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of attempts, one per row."""
    table = _table(("started (UTC)", "step", "ended", "class"), ("steps", "wall", "cost"))
    for row in rows:
        table.add_row(
            str(row["started"])[:16].replace("T", " "),
            escape(f"{row['verb']} {row['key']} #{row['number']}"),
            row["cause"] or "done",
            escape(row["compute"]) + (" (spot)" if row["spot"] else ""),
            _steps(row["steps"]),
            span(row["seconds"]["wall"]),
            money(row["cost"]),
            of_time(row["seconds"]),
        )
    return table


def of_time(seconds: Mapping[str, float]) -> str:
    """Return where the time went: `useful 2.5 h, start-up 30.0 s …`, without what took none."""
    return ", ".join(f"{name} {span(seconds[part])}" for part, name in PARTS.items() if seconds[part])


def lines(told: Mapping[str, Any]) -> list[str]:
    """Return the sentences below a project's table: by verb, and all together."""
    found = [f"{verb}: {_sum(figures)}" for verb, figures in told["steps"].items()]
    return [*found, f"all steps on record: {_sum(told['total'])}"]


def span(seconds: float | None) -> str:
    """Return a time in its largest sensible unit."""
    if seconds is None:
        return "–"
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f}{SPACE}{unit}"
    return "0" if seconds == 0 else f"{seconds:.1f}{SPACE}s"


def money(value: float | None, unpriced: int = 0) -> str:
    """Return an amount, and how many attempts it leaves out for want of a price; a dash when nothing is known."""
    if value is None:
        return "–"
    digits = 2 if abs(value) >= 1 else 4
    return f"{value:,.{digits}f}" + (f" + {unpriced} unpriced" if unpriced else "")


def share(value: float | None) -> str:
    """Return a share in per cent."""
    return "–" if value is None else f"{100 * value:.1f}{SPACE}%"


def counted(row: Mapping[str, Any]) -> str:
    """Return how many attempts there were and why they ended: `4 (2 interrupted, 1 lost)`."""
    causes = ", ".join(f"{n} {cause}" for cause, n in row["causes"].items())
    return f"{row['attempts']}" + (f" ({causes})" if causes else "")


def _table(texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return an empty table; its last column takes what room is left."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in texts:
        table.add_column(name, no_wrap=name in ("version", "window"))
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=name != "steps")
    table.add_column("of the time", min_width=16)
    return table


def _steps(steps: Mapping[str, Any] | None) -> str:
    """Return which steps an attempt took and how many of them count."""
    if steps is None:
        return "–"
    return f"{steps['resumed']:,}→{steps['reached']:,}, {steps['kept']:,} kept"


def _sum(figures: Mapping[str, Any]) -> str:
    cost = money(figures["cost"], figures["unpriced"])
    return f"{figures['attempts']} attempts, {span(figures['wall'])}, cost {cost}"
