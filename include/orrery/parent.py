"""Ends a process when the one that started it is gone, so that a killed worker leaves no step behind (Linux)."""

from __future__ import annotations

import os
import signal
import sys


def follow_parent() -> None:
    """Ask the kernel for SIGTERM when the process named by `ORRERY_PARENT` dies; without that name do nothing."""
    parent = os.environ.pop("ORRERY_PARENT", "")
    if parent:
        follow(int(parent))


def follow(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent, process `parent`, dies. A forked child has to ask anew."""
    if sys.platform != "linux":
        return
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)
