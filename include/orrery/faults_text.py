"""The language of faults as a table, for people."""

from __future__ import annotations

from rich.table import Table

from orrery.endings import JUDGED
from orrery.faults import EVERY, KINDS, MOMENTS, OPTIONS
from orrery.twin import SAYS


def kinds() -> Table:
    """Return what there is to rehearse."""
    table = Table(
        "kind", "what it does", "options", "how an attempt without a result ends", title="STEP: KIND@OPTION=VALUE,…; …"
    )
    for name, how in KINDS.items():
        moment = [" | ".join(f"{m}=" for m in MOMENTS)] if how.while_it_runs else []
        mine = [f"{option}=" for option in how.options if option not in MOMENTS]
        table.add_row(name, how.does, ", ".join([*moment, *mine]), _ends(name))
    return table


def _ends(kind: str) -> str:
    if kind not in SAYS:
        return "as the step does: 75, tried again"
    status, called = JUDGED[SAYS[kind][0]]
    return f"{status} ({called})"


def options() -> Table:
    """Return the options; those of all kinds last."""
    table = Table("option", "what it says", title="OPTIONS")
    for name, text in OPTIONS.items():
        table.add_row(f"{name}=", text + (" (of every kind)" if name in EVERY else ""))
    return table
