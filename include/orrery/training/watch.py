"""Watches over the processes of a training: one that is dead, or has hung, brings the others down in seconds.

Two processes wait for each other at every step. gloo tells a rank when its peer is gone, most of the time; NCCL does
not, and nobody tells of a peer that has hung. So each rank leaves a sign of life (`control.Control`), and this thread
of the parent looks at them. It ends who holds the others up by SIGKILL, after which torchrun's agent ends the rest.
Of the ranks of other nodes it sees nothing; that one of these is gone it is told (`meeting.Meeting.gone`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from orrery.training.control import AWAY, STARTS

LOOK_S = 0.5
DEAD_S = 5.0  # what a rank has, after another one's death, to end by itself
FIRST_S = 900.0  # before a rank has come round twice: a module may be compiled
AWAY_S = 900.0  # a rank that said so: it writes a checkpoint to a slow store
HUNG_S = 20.0  # at least this long without a sign of life is taken for hung,
SLOWEST = 5.0  # and at least this many times the longest time that there was between two


class Watch:
    """Looks at the beats of ranks `first`, `first` + 1, … for the length of a `with` block.

    `said` tells what it did, and why. `gone` returns a sentence when a node is lost that these ranks wait for.
    """

    def __init__(
        self, beats: list[Path], hung_s: float = HUNG_S, *, first: int = 0, gone: Callable[[], str] | None = None
    ) -> None:
        self.beats, self.hung_s, self.first = beats, hung_s, first
        self._gone = gone or (lambda: "")
        self.said = ""
        self._seen: dict[int, tuple[float, float]] = {}
        self._longest: dict[int, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def wait(self, longest: float) -> None:
        """Wait until all ranks have ended (each takes its beat away), at most so many seconds."""
        end = time.monotonic() + longest
        while time.monotonic() < end:
            pids = [int(text.split()[0]) for path in self.beats if (text := _text(path))]
            if not any(_runs(pid) for pid in pids):
                return
            time.sleep(0.05)

    def _run(self) -> None:
        dead_since: float | None = None
        while not self._end.wait(LOOK_S):
            pids = {rank: text for rank, path in enumerate(self.beats) if (text := _text(path))}
            dead = [rank for rank, text in pids.items() if not _runs(int(text.split()[0]))]
            lost = f"training process {self.first + dead[0]} is gone" if dead else self._gone()
            if lost:
                dead_since = dead_since or time.monotonic()
                if pids and time.monotonic() - dead_since > DEAD_S:
                    self._kill(pids, f"{lost}, and the others did not end by themselves")
                continue
            for rank, text in pids.items():
                if not text.endswith(STARTS) and self._hung(rank, away=text.endswith(AWAY)):
                    since = time.monotonic() - self._seen[rank][1]
                    self._kill(
                        pids, f"training process {self.first + rank} has hung: no sign of life for {since:.0f} s"
                    )
                    break

    def _hung(self, rank: int, *, away: bool) -> bool:
        try:
            beat = self.beats[rank].stat().st_mtime
        except FileNotFoundError:
            return False  # it has done its part
        now = time.monotonic()  # only changes of the file are looked at: the clock of the day may jump
        before, since = self._seen.setdefault(rank, (beat, now))
        if beat != before:
            self._longest[rank] = max(self._longest.get(rank, 0.0), now - since)
            self._seen[rank] = (beat, now)
            return False
        limit = max(self.hung_s, SLOWEST * self._longest[rank]) if rank in self._longest else FIRST_S
        return now - since > (max(limit, AWAY_S) if away else limit)

    def _kill(self, pids: dict[int, str], why: str) -> None:
        self.said = self.said or why
        for text in pids.values():
            _end(int(text.split()[0]))


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _runs(pid: int) -> bool:
    """Tell whether a process is there and is no zombie (its parent, torchrun's agent, may be slow to reap it)."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True
    return state != "Z"
