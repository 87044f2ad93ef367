"""What a step says of itself where its machine keeps it, though the step is killed: memory, and in the end its result.

`ORRERY_LAST_WORDS` names the file; in a pod it is /dev/termination-log, which the kubelet keeps as the container's
`terminated.message`. It holds one small JSON document (4096 bytes at most), written anew about each second:

    {"memory_peak": bytes, "memory_limit": bytes, "at": seconds since the step's start}

and once there is a result also `status`, and `kind` and `message` of its error: `kubectl describe pod` says why.
Memory is the container's, as the kernel's limit sees it (page cache included). Where no limit is set (no container), it
is the resident memory of the step and all below it, pages that they share counted several times.

Nothing here may fail a step, or keep it: what does not work is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from orrery.contract import Result

VARIABLE = "ORRERY_LAST_WORDS"
LONGEST = 4096  # bytes; the kubelet keeps no more
EVERY_S = 1.0
JOIN_S = 1.0  # for how long the end of a step may be kept by a file that takes no byte
PROC = Path("/proc")
UNLIMITED = 1 << 60  # cgroup v1 has no word for it but a number that no machine has


class Memory(NamedTuple):
    """Bytes. `limit`: None where there is none."""

    peak: int
    limit: int | None


class LastWords:
    """Writes a step's last words, from a thread that takes no lock: ranks are forked while it runs."""

    def __init__(self, path: str, started: float) -> None:
        self._started = started
        self._measure = meter()
        self._memory: Memory | None = None
        self._at = 0.0
        self._length = 0
        self._over = threading.Event()
        # In a pod the file is there, a mount of its own: it cannot be replaced, only written over.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._thread = threading.Thread(target=self._run, name="last-words", daemon=True)
        self._thread.start()

    def end(self, result: Result) -> None:
        """Write how it ended, beside the memory."""
        with contextlib.suppress(Exception):
            self._over.set()
            self._thread.join(JOIN_S)
            if not self._thread.is_alive():
                self._look()
                self._write(**_said(result))

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        with contextlib.suppress(Exception):
            while True:
                self._look()
                self._write()
                if self._over.wait(EVERY_S):
                    return

    def _look(self) -> None:
        peak = self._memory.peak if self._memory else 0
        seen = self._measure()
        self._memory, self._at = Memory(max(seen.peak, peak), seen.limit), time.time() - self._started

    def _write(self, **said: str) -> None:
        told: dict[str, Any] = {"memory_peak": self._memory.peak} if self._memory else {}
        if self._memory and self._memory.limit:
            told["memory_limit"] = self._memory.limit
        text = fitting({**told, "at": round(self._at, 1), **said})
        # Killed in between, it must be readable: spaces cover what was longer before, in one write.
        os.pwrite(self._file, text.ljust(self._length), 0)
        self._length = max(self._length, len(text))


def begin(started: float) -> LastWords | None:
    """Begin to write, where `ORRERY_LAST_WORDS` says so and the file may be written; `started`: time.time() of then."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    with contextlib.suppress(Exception):
        return LastWords(path, started)
    return None


def fitting(told: dict[str, Any]) -> bytes:
    """Return a document of at most `LONGEST` bytes: its message is cut."""
    text = _text(told)
    if len(text) <= LONGEST:
        return text
    message = str(told.get("message", ""))
    # How many characters fit depends on which they are.
    fit = (
        bisect_right(range(len(message)), LONGEST, key=lambda n: len(_text({**told, "message": message[:n] + "…"}))) - 1
    )
    if fit < 0:
        return _text({k: v for k, v in told.items() if k not in ("message", "kind")})
    return _text({**told, "message": message[:fit] + "…"})


def _text(told: dict[str, Any]) -> bytes:
    return json.dumps(told, ensure_ascii=False).encode(errors="replace")


def meter() -> Callable[[], Memory]:
    """Return what measures this process's container, or where that has no limit, its tree of processes."""
    for found in (_cgroup2, _cgroup1):
        with contextlib.suppress(OSError, ValueError, IndexError):
            measure = found()
            if measure is not None and measure().limit is not None:
                return measure
    return lambda: Memory(resident(os.getpid()), None)


def resident(pid: int) -> int:
    """Return the resident memory of a process and all its descendants, in bytes."""
    page, total, open_ = os.sysconf("SC_PAGE_SIZE"), 0, [pid]
    while open_:
        process = PROC / str(open_.pop())
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(_read(process / "statm").split()[1]) * page
            for thread in (process / "task").iterdir():
                open_ += map(int, _read(thread / "children").split())
    return total


def _cgroup2() -> Callable[[], Memory] | None:
    folder = _folder("cgroup2", lambda controllers: controllers == "")
    if folder is None:
        return None
    peak = folder / ("memory.peak" if (folder / "memory.peak").exists() else "memory.current")  # before Linux 5.19

    def measure() -> Memory:
        limit = _read(folder / "memory.max").strip()
        return Memory(int(_read(peak)), None if limit == "max" else int(limit))

    return measure


def _cgroup1() -> Callable[[], Memory] | None:
    folder = _folder("cgroup", lambda controllers: "memory" in controllers.split(","))
    if folder is None:
        return None

    def measure() -> Memory:
        limit = int(_read(folder / "memory.limit_in_bytes"))
        peak = int(_read(folder / "memory.max_usage_in_bytes"))
        return Memory(peak, limit if limit < UNLIMITED else None)

    return measure


def _folder(kind: str, mine: Callable[[str], bool]) -> Path | None:
    """Return where this process's group of a hierarchy is mounted: a container sees its own alone, as the root."""
    lines = (line.split(":", 2) for line in _read(PROC / "self" / "cgroup").splitlines())
    path = next((p for _, controllers, p in lines if mine(controllers)), None)
    if path is None:
        return None
    for line in _read(PROC / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        type_, _, options = after.split()[:3]
        if type_ != kind or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        inside = path[len(root) :] if root != "/" and f"{path}/".startswith(f"{root}/") else path
        for folder in (Path(point + inside), Path(point)):
            if any((folder / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
                return folder
    return None


def _read(file: Path) -> str:
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(handle, 1 << 16).decode(errors="replace")
    finally:
        os.close(handle)


def _said(result: Result) -> dict[str, str]:
    """Return what is said of a result."""
    error = result.error
    if error is None:
        return {"status": result.status}
    return {"status": result.status, "kind": error.kind, "message": error.message}
