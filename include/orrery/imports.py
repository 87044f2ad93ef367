"""How long a process has spent on imports, wherever in the code they stand.

A step that loads ten seconds of libraries to do one second of work is slow; its result document must say so,
and most verbs import what is heavy only when they need it.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Mapping, Sequence
from types import ModuleType

_spent = 0.0


def spent() -> float:
    """Return the seconds spent on imports since `watch`."""
    return _spent


def watch() -> None:
    """Begin to count. Only the outermost import is timed, with all that it pulls in; once per process."""
    original, inside = builtins.__import__, False

    def timed(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        nonlocal inside
        global _spent  # noqa: PLW0603  one process, one clock
        if inside:
            return original(name, globals, locals, fromlist, level)
        inside, began = True, time.perf_counter()
        try:
            return original(name, globals, locals, fromlist, level)
        finally:
            inside = False
            _spent += time.perf_counter() - began

    builtins.__import__ = timed
