"""The command line. `orrery step` is for machines and loads nothing else; the rest is for people."""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    """Entry of the `orrery` command."""
    started = _process_start()
    if sys.argv[1:2] == ["step"]:
        from orrery.parent import follow_parent
        from orrery.step import main as step

        follow_parent()
        raise SystemExit(step(sys.argv[2:], started))
    from orrery import errors
    from orrery.commands import app

    try:
        app()
    except errors.OrreryError as e:
        from rich.console import Console
        from rich.markup import escape

        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(e.message)}")
        if e.hint:
            console.print(f"  → {escape(e.hint)}")
        raise SystemExit(e.exit_code) from None


def _process_start() -> float:
    """Return when this process was started, so that the interpreter's own start counts as well (Linux)."""
    try:
        with open("/proc/self/stat") as f:
            ticks = int(f.read().rsplit(")", 1)[1].split()[19])
        with open("/proc/uptime") as f:
            uptime = float(f.read().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
