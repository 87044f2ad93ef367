"""The language of faults as tables, for people."""

from __future__ import annotations

from rich import box
from rich.table import Table

from orrery.faults import KINDS, MOMENTS, OPTIONS


def kinds() -> Table:
    """Return what there is to rehearse."""
    table = Table("kind", "what it does to a step", "the attempt ends", "options", box=box.SIMPLE_HEAD)
    for name, how in KINDS.items():
        mine = [option for option in how.options if option not in MOMENTS]
        table.add_row(name, how.does, how.ends, ", ".join([*(["moment"] if how.while_it_runs else []), *mine]))
    return table


def options() -> Table:
    """Return the options."""
    table = Table("option", "what it says", box=box.SIMPLE_HEAD)
    for name, text in OPTIONS.items():
        table.add_row(name, f"moment: {text}" if name in MOMENTS else text)
    return table
