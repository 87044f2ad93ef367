"""The command line. `orrery step` is for machines and loads nothing else; the rest is for people."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orrery.errors import OrreryError


def main() -> None:
    """Entry of the `orrery` command."""
    started = _process_start()
    if sys.argv[1:2] == ["step"]:
        from orrery.parent import follow_parent
        from orrery.step import main as step

        follow_parent()
        raise SystemExit(step(sys.argv[2:], started))
    from orrery.errors import STOPPED, OrreryError

    try:
        from orrery.commands import app

        app()
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
    except OrreryError as e:
        raise SystemExit(_tell(e)) from None
    except OSError as e:
        raise SystemExit(_tell(_explained(e))) from None


def _tell(error: OrreryError) -> int:
    """Print an error as people read it; return the exit code."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] {escape(error.message)}")
    if error.hint:
        console.print(f"  → {escape(error.hint)}")
    return error.exit_code


def _explained(error: OSError) -> OrreryError:
    """Return what a file system's refusal means for the person: a folder not writable, a file not readable."""
    from orrery.errors import OrreryError, UserError
    from orrery.store import trouble

    where = str(error.filename or "the file system")
    try:
        with trouble(where):
            raise error
    except OrreryError as e:
        return e
    except FileNotFoundError:
        return UserError(f"{where}: there is no such file or folder")


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
