"""Processes of this machine, told apart safely: a number alone may belong to someone else by now.

A process is (pid, start time), read from /proc. A server's processes are found by a marker in their
environment, which children inherit whatever session or group they move to, and by descent.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orrery.errors import OrreryError, UserError

PROC = Path("/proc")
MARKER = "ORRERY_SERVER"


@dataclass(frozen=True, order=True)
class Process:
    """One process; `start` (clock ticks since boot) tells it from a later one with the same number."""

    pid: int
    start: int

    def alive(self) -> bool:
        """Whether it still runs: a recycled number and a zombie do not count."""
        stat = _stat(self.pid)
        return stat is not None and stat.start == self.start and stat.state not in "ZX"

    def command(self) -> str:
        """Return its command line, or the empty string when it is gone or hidden."""
        with suppress(OSError):
            line = (PROC / str(self.pid) / "cmdline").read_bytes()
            return line.replace(b"\0", b" ").decode(errors="replace").strip()
        return ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process, never to one that took over its number."""
        with suppress(OSError):  # gone, or not ours to signal
            fd = os.pidfd_open(self.pid)
            try:
                if self.alive():
                    signal.pidfd_send_signal(fd, number)
            finally:
                os.close(fd)


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    session: int
    start: int


def require() -> None:
    """Raise `UserError` where there is no /proc to tell processes apart."""
    if not (PROC / "self" / "stat").exists() or not hasattr(os, "pidfd_open"):
        raise UserError(
            "the local servers need Linux (they are told apart through /proc)",
            hint="on another system run them in containers, or inside WSL or a Linux virtual machine",
        )


def identify(pid: int) -> Process | None:
    """Return the process that has this number now."""
    stat = _stat(pid)
    return Process(pid, stat.start) if stat is not None and stat.state not in "ZX" else None


def family(marker: str, leader: Process | None = None) -> list[Process]:
    """Return all live processes that carry `marker`, those in the leader's session, and their descendants.

    The caller and its ancestors are never among them: `orrery down` may be typed in a marked shell.
    """
    stats = {pid: stat for pid in _pids() if (stat := _stat(pid)) is not None and stat.state not in "ZX"}
    spared = _ancestors(os.getpid(), stats)
    session = leader.pid if leader is not None and leader.alive() else None
    found = {pid for pid, stat in stats.items() if stat.session == session or _marked(pid, marker)}
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.parent, []).append(pid)
    queue = [pid for pid in found if pid not in spared]
    while queue:
        for child in children.get(queue.pop(), []):
            if child not in found:
                found.add(child)
                queue.append(child)
    return sorted(Process(pid, stats[pid].start) for pid in found - spared)


def end(find: Callable[[], list[Process]], grace: float = 20.0) -> int:
    """End everything that `find` returns, also what appears meanwhile; return how many there were.

    SIGTERM first, so that a step can save; SIGKILL after `grace` seconds.
    Raises `OrreryError` when something outlives even that.
    """
    seen: set[Process] = set()
    began = time.monotonic()
    while processes := find():
        waited = time.monotonic() - began
        if waited > grace + 10:
            left = "\n".join(f"  {p.pid}  {p.command()[:100]}" for p in processes)
            raise OrreryError(f"these processes could not be ended:\n{left}")
        for process in processes:
            if waited > grace:
                process.signal(signal.SIGKILL)
            elif process not in seen:
                process.signal(signal.SIGTERM)
        seen.update(processes)
        time.sleep(0.1)
    return len(seen)


def port_holder(port: int) -> Process | None:
    """Return the process that listens on a TCP port, where /proc lets us see it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for pid in _pids() if inodes else ():
        with suppress(OSError), os.scandir(PROC / str(pid) / "fd") as fds:
            for fd in fds:
                with suppress(OSError):
                    if os.readlink(fd.path) in inodes:  # noqa: PTH115 - a Path per descriptor is slow
                        return identify(pid)
    return None


def _pids() -> list[int]:
    return [int(folder.name) for folder in PROC.iterdir() if folder.name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    try:
        # The command's name may hold spaces and brackets: fields count from the last bracket on.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return _Stat(state=fields[0], parent=int(fields[1]), session=int(fields[3]), start=int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


def _marked(pid: int, marker: str) -> bool:
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return f"{MARKER}={marker}".encode() in environment.split(b"\0")


def _ancestors(pid: int, stats: dict[int, _Stat]) -> set[int]:
    line = {pid}
    while (stat := stats.get(pid)) is not None and stat.parent not in line:
        pid = stat.parent
        line.add(pid)
    return line
